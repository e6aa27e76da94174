"""`eval.py score`: a saved delta gives the run's numbers again, merged or not, wherever the files have moved."""

import math
import os
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data import tasks
from deltas import merge
from harness import report, results
from harness.settings import settings_of
from lab import score
from model import Refused

pytestmark = pytest.mark.usefixtures("few_examples")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where a file is rebuilt


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{name: (record, file)} of short runs: LoRA on sentiment, on own data without a test file, on descriptions."""
    out, found = tmp_path_factory.mktemp("out"), {}
    own = tmp_path_factory.mktemp("dishes")
    for split, n in (("train", 16), ("dev", 8)):
        rows = [f"the {'soup' if i % 2 else 'fish'} {split} {i}\t{i % 2}" for i in range(n)]
        (own / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "SIZES", {"dev": 10, "test": 14})
        for name, choice in (("sentiment", {"task": "sentiment"}), ("own", {"data": str(own)}),
                             ("describe", {"task": "describe", "steps": 1}), ("corpus", {"task": "corpus"}),
                             ("scratch", {"task": "sentiment", "scratch": True})):
            made = settings_of("lora", **{"base": "gpt-xs", "steps": 4, "examples": 8, "device": "cpu"} | choice)
            found[name] = train.run_once(made, out, report.quiet), out / made.file
    return found


def lines(capsys, *argv):
    score.main([str(word) for word in argv])
    return capsys.readouterr().out.splitlines()


def test_the_command_gives_the_runs_score_again_and_shows_answers(saved, capsys):
    record, file = saved["sentiment"]
    shown = lines(capsys, file, "--show", "3")
    assert shown[0] == f"file       {file}, {record['stored_bytes']:,} bytes"
    assert shown[2] == f"score      {record['score']:.2f} % accuracy on 14 of test"
    assert sum(line.startswith("  text ") for line in shown) == 3
    dev = lines(capsys, file, "--split", "dev")
    assert dev[2] == f"score      {record['dev_score']:.2f} % accuracy on 10 of dev", "the best step was kept"


def test_a_run_from_random_weights_is_rebuilt_on_the_same_ones(saved, capsys):
    record, file = saved["scratch"]
    torch.manual_seed(99)
    assert f" {record['score']:.2f} % accuracy" in "\n".join(lines(capsys, file))


def test_after_merge_it_is_the_merged_model_that_answers(saved, capsys, monkeypatch):
    """A merge that comes out wrong must be seen: here all logits of the merged model are 0, which is "good"."""
    def answers(*argv):
        shown = lines(capsys, file, "--show", "14", *argv)
        return [line.split()[1] for line in shown if line.startswith("  answered")], shown[-14 * 4 - 2], shown[2]

    def wrong(model):
        model = merge(model)
        model.head.decoder.weight = torch.nn.Parameter(torch.zeros_like(model.tokens.weight))
        return model

    record, file = saved["sentiment"]
    plain, as_run, _ = answers()
    merged, score_line, distance = answers("--merge")
    assert "bad" in plain and merged == plain and score_line == as_run
    assert float(distance.split("at most ")[1].split()[0]) < 1e-4
    monkeypatch.setattr(score, "merge", wrong)
    merged, score_line, distance = answers("--merge")
    assert merged == ["good"] * 14 and score_line == "score      50.00 % accuracy on 14 of test"
    assert float(distance.split("at most ")[1].split()[0]) > 1


def test_the_distance_of_two_models_is_that_of_their_logits_on_real_tokens(saved):
    model, tokenizer, task = score.rebuild(saved["sentiment"][1])
    other = lambda ids, keep: model(ids, keep) + torch.where(keep, 0.25, 9.0)[..., None]
    assert score.apart(model, other, task, tokenizer.pad) == pytest.approx(0.25, abs=1e-5)


def test_own_data_without_a_test_file_are_scored_on_dev(saved, capsys):
    record, file = saved["own"]
    shown = lines(capsys, file)
    assert shown[2] == f"score      {record['score']:.2f} % accuracy on 8 of dev"
    with pytest.raises(Refused, match="--split test: this task has no such file"):
        score.main([str(file), "--split", "test"])


def test_what_has_no_score_says_so(saved):
    with pytest.raises(Refused, match="pretraining has no score"):
        score.main([str(saved["corpus"][1])])
    with pytest.raises(Refused, match="nowhere.pt: no such file"):
        score.main(["nowhere.pt"])


def test_the_folders_of_a_file_are_in_the_newest_record_beside_it(saved, tmp_path):
    """A delta file has names only: results.jsonl says where base and data were, or else the user."""
    _, file = saved["own"]
    shutil.copy(file, tmp_path)
    notes = {"base": "gpt-xs", "data": "dishes"}
    newer, older = {"format": 2, "notes": notes}, {"format": 1, "notes": notes}
    assert score.folders(tmp_path / file.name, older) == notes, "an older file names the folders"
    assert score.folders(tmp_path / file.name, newer) == {"base": "gpt-xs", "data": "<dishes>"}
    for base in ("one", "two"):
        results.append(tmp_path, {"file": file.name, "where": {"base": base, "data": "there"}})
    results.append(tmp_path, {"file": "another.pt", "where": {"base": "three", "data": None}})
    results.append(tmp_path, {"file": file.name, "where": {"base": 3}})
    assert score.folders(tmp_path / file.name, newer) == {"base": "two", "data": "there"}
    with pytest.raises(Refused, match="its base, two, is not here; --base DIR says where it is now"):
        score.main([str(tmp_path / file.name)])
    with pytest.raises(Refused, match="its data, there, is not here; --data DIR says where it is now"):
        score.main([str(tmp_path / file.name), "--base", "gpt-xs"])


def test_a_delta_is_scored_where_its_data_have_moved_and_not_on_others(saved, tmp_path, monkeypatch, capsys):
    """The file has come alone. A folder of the same name that happens to be here is not taken for its data."""
    record, file = saved["own"]
    shutil.copy(file, tmp_path)
    here = shutil.copytree(record["where"]["data"], tmp_path / Path(record["where"]["data"]).name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=rf"its data, <{here.name}>, is not here; --data DIR says where it is now"):
        score.main([file.name])
    shown = lines(capsys, file.name, "--data", here.name)
    assert shown[2] == f"score      {record['score']:.2f} % accuracy on 8 of dev"
    for split in ("train", "dev"):
        text = (here / f"{split}.tsv").read_text(encoding="utf-8")
        (here / f"{split}.tsv").write_text(text.replace("\t0", "\tz"), encoding="utf-8")
    with pytest.raises(Refused, match=r"trained on a task whose labels are \['0', '1'\]; here they are \['1', 'z'\]"):
        score.main([file.name, "--data", here.name])
    for option in ("--base", "--data"):
        with pytest.raises(Refused, match=f"{option} nowhere: no such folder"):
            score.main([file.name, option, "nowhere"])


def test_label_words_must_be_the_tokens_that_the_delta_was_trained_on(saved, monkeypatch):
    real = tasks.load_task

    def turned(*inputs):
        task = real(*inputs)
        return replace(task, words=task.words[::-1])
    monkeypatch.setattr(tasks, "load_task", turned)
    with pytest.raises(Refused, match="trained on a task whose tokens of label words are"):
        score.main([str(saved["sentiment"][1])])


def test_several_deltas_take_turns_on_one_base_that_is_loaded_once(saved, tmp_path, capsys, monkeypatch):
    """Label words, own classes, written text; one in bfloat16: between them the base is whole again."""
    loaded, load_base = [], score.load_base
    monkeypatch.setattr(score, "load_base", lambda *given: loaded.append(given) or load_base(*given))
    made = settings_of("bitfit", base="gpt-xs", task="rating", steps=4, examples=8, device="cpu", dtype="bfloat16")
    rating = train.run_once(made, tmp_path, report.quiet), tmp_path / made.file
    turns = [saved["sentiment"], saved["own"], rating, saved["describe"], saved["sentiment"]]
    shown = lines(capsys, "--show", "0", *(file for _, file in turns))
    assert loaded == [("gpt-xs", False)]
    assert [line.split()[1] for line in shown if line.startswith("score ")] == [
        f"{record['score']:.2f}" for record, _ in turns]
    switches = [line for line in shown if line.startswith("switch ")]
    assert len(switches) == 5 and f"{rating[0]['stored_bytes']:,} bytes; the base alone" in switches[2]
    assert shown[-1].endswith("ms: 441,600 bytes, the same bit for bit after 5 deltas"), shown[-1]
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="the base has changed"):
        patch.setattr(score.Base, "fingerprint", lambda self: str(time.perf_counter()))
        score.main([str(saved["own"][1])] * 2)
    with pytest.raises(Refused, match=f"{saved['scratch'][1].name}: its base is gpt-xs from random weights, and that"):
        score.main([str(saved["own"][1]), str(saved["scratch"][1])])


@pytest.fixture
def standard_input(tmp_path):
    """Lets bytes be what a command reads from standard input."""
    before = os.dup(0)

    def given(content):
        (tmp_path / "lines").write_bytes(content)
        with open(tmp_path / "lines", "rb") as file:
            os.dup2(file.fileno(), 0)
    yield given
    os.dup2(before, 0)
    os.close(before)


def alone(model, task, ids, words=None):
    """(place of the most likely answer, its probability) of one text: the last token's logits, or the label words'."""
    logits = model(torch.tensor([ids], device=DEVICE))[0, -1]
    chances = (logits if words is None else logits[words]).softmax(dim=-1)
    return chances.argmax().item(), chances.max().item()


def test_texts_on_standard_input_are_answered_line_by_line(saved, capsys, standard_input):
    """A cloze and a classifier: each text gets what it gets alone, in the order of the lines."""
    texts = ["the soup was cold and so were we", "great", "we went to the old barrel . the fish was the best of all"]
    standard_input("\n".join(texts).encode() + b"\n")
    for name in ("sentiment", "own"):
        model, tokenizer, task = score.rebuild(saved[name][1])
        score.main([str(saved[name][1])])
        shown = capsys.readouterr()
        for text, line in zip(texts, shown.out.splitlines(), strict=True):
            template = " it was" if name == "sentiment" else ""
            best, chance = alone(model, task, tokenizer.encode(text + template), task.words)
            answer, probability = line.split("\t")
            assert answer == task.labels[best] and float(probability) == pytest.approx(chance, abs=1e-4), (name, text)
        assert re.search(rf"answered   3, [\d,]+ a second, by LoRA.* in float32 on {DEVICE}\n$", shown.err), shown.err
        os.lseek(0, 0, os.SEEK_SET)


def test_a_text_is_continued_and_a_words_probability_is_that_of_the_whole_answer(saved, capsys):
    model, tokenizer, task = score.rebuild(saved["describe"][1])
    prompt = task.test[0].text
    answer, probability = lines(capsys, saved["describe"][1], "--text", prompt)[0].rsplit("\t", 1)
    assert answer == tasks.predictions(model, task, task.test[:1], tokenizer)[0]
    start, told = task.encoder.halves(prompt, answer)
    nats, ids = [], start
    for word in [*told, tokenizer.eos]:
        nats.append(-model(torch.tensor([ids], device=DEVICE))[0, -1].log_softmax(dim=-1)[word].item())
        ids = [*ids, word]
    assert float(probability) == pytest.approx(math.exp(-sum(nats) / len(nats)), abs=1e-4)


def test_a_text_that_cannot_be_answered_is_refused_and_one_that_was_cut_is_told(saved, capsys, standard_input):
    file = str(saved["sentiment"][1])
    assert len(lines(capsys, file, "--text", "good " * 500)) == 1
    for words, why in (([file, "--text", " "], "text 1 of 1: it is empty"),
                       ([file, "--text", "a", "--split", "dev"], "--split dev: texts are answered by one FILE alone"),
                       ([file, file, "--text", "a"], f"{file}: texts are answered by one FILE alone"),
                       ([str(saved["corpus"][1]), "--text", "a"], "a pretrained base, which answers nothing")):
        with pytest.raises(Refused, match=re.escape(why)):
            score.main(words)
    for content, why in ((b"one\n\nthree\n", "text 2 of 3: it is empty"), (b"one\ntw\xff\n", "not UTF-8 .line 2.")):
        standard_input(content)
        with pytest.raises(Refused, match=why):
            score.main([file])
    score.tell(file, score.settings_of(file, base=None, data=None), score.Base(score.settings_of(
        file, base=None, data=None)), ["good " * 500, "good"], False)
    assert capsys.readouterr().err.endswith("; 1 were cut to what the model reads\n")
    standard_input(b"")
    assert lines(capsys, file)[2].startswith("score "), "nothing on standard input: the task's own examples"


def test_a_run_in_bfloat16_is_scored_in_bfloat16(saved, tmp_path, capsys):
    made = settings_of("lora", base="gpt-xs", task="sentiment", steps=4, examples=8, device="cpu", dtype="bfloat16")
    record = train.run_once(made, tmp_path, report.quiet)
    settings = score.settings_of(tmp_path / made.file, base=None, data=None)
    model, _, _ = score.rebuild(tmp_path / made.file)
    assert settings.dtype == "bfloat16" and model.tokens.weight.dtype == torch.bfloat16
    assert lines(capsys, tmp_path / made.file)[2] == f"score      {record['score']:.2f} % accuracy on 14 of test"


def test_what_was_typed_wrongly_is_named(saved):
    for words, why in ((["--show", "-1"], "--show -1: a number of examples, 0 or more"), (["--base="], "base '': an"),
                       (["--split", "train"], "invalid choice: 'train'"), ([], None)):
        with pytest.raises(Refused, match=why or "the following arguments are required: FILE"):
            score.main([str(saved["own"][1])] * (why is not None) + words)


def test_no_control_character_of_a_text_or_an_answer_reaches_the_terminal(capsys):
    score.show([tasks.Example([], [], "a\x1b[31m red\nline", ["\x07"])], ["\x1b]0;title"], 1)
    assert capsys.readouterr().out == (
        "\n  text      a\\x1b[31m red\\nline\n  wanted    \\x07\n  answered  \\x1b]0;title   x\n")


def test_the_bootstrap_draws_as_many_examples_again_and_again():
    """Of 100 answers 80 are right: a draw has 80 ± 4, the middle 95 % some 72 to 88. With all right nothing varies."""
    task, examples = SimpleNamespace(metric="accuracy"), [tasks.Example([], [], "", ["yes"])] * 100
    low, high = score.bootstrap(task, examples, ["yes"] * 80 + ["no"] * 20)
    assert 71 <= low <= 73 and 87 <= high <= 88
    assert score.bootstrap(task, examples, ["yes"] * 100) == [100, 100]


def test_a_written_text_has_bleu_against_all_of_its_references(saved, capsys, monkeypatch):
    examples = [tasks.Example([], [], "", ["the old barrel serves thai food", "thai food at the old barrel"]),
                tasks.Example([], [], "", ["it is cheap and by the river"])]
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert score.bleu(examples, ["", ""]) == "BLEU needs sacrebleu: pip install sacrebleu"
    assert lines(capsys, saved["describe"][1])[3] == "           BLEU needs sacrebleu: pip install sacrebleu"
    monkeypatch.undo()
    pytest.importorskip("sacrebleu", reason="pip install -r requirements-extra.txt")
    for first in examples[0].answers:
        assert score.bleu(examples, [first, "it is cheap and by the river"]) == "BLEU 100.0"
    assert score.bleu(examples, ["a", "b"]) == "BLEU 0.0"


def test_an_answer_is_marked_right_if_it_is_one_of_the_references(capsys):
    examples = [tasks.Example([], [], "who?", ["the fox", "a fox"])] * 3
    score.show(examples, ["a fox", "a dog", "the fox"], 2)
    marks = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "answered" in line]
    assert marks == ["=", "x"]
