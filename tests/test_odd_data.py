"""Data as people bring it: marks, quotes, columns, scripts, sizes. It is read rightly, or refused by file and line."""

import json
import shutil

import pytest
import tiktoken
import torch

from data import own, tasks, tokenizers
from data.bases import SHAPES
from data.tasks import Encoder, Example, Task, load_task
from lab.score import bleu
from model import Config, NotFinite, Refused

PLAIN, WORLD = tokenizers.world(wraps=False), tokenizers.world()
GPT, BERT = SHAPES["gpt-xs"], SHAPES["bert-xs"]
TSV = "text\tlabel\na fine film\t1\na dull film\t0\n"
JSONL = '{"prompt": "a", "completion": "b"}\n'
CSV = 'mr,ref\n"name[A]","A is good."\n"name[B]",B is bad.\n'


def folder(path, **files):
    """Files by name (train_tsv for train.tsv) in a folder that has nothing else."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("_", ".")).write_bytes(content.encode("utf-8"))
    return path


def refused(path, *parts):
    with pytest.raises(Refused) as error:
        own.read(path)
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message and "\x1b" not in message and len(message) < 500, message


# ---- what stands around the content ----

def test_a_byte_order_mark_is_no_part_of_any_file(tmp_path):
    words = '{"template": "{text} [MASK]", "words": {"0": "bad", "1": "good"}}'
    for files in ({"train_tsv": TSV, "dev_tsv": TSV, "template_json": words},
                  {"train_jsonl": JSONL, "dev_jsonl": JSONL}, {"train_csv": CSV, "dev_csv": CSV}):
        plain = own.read(folder(tmp_path, **files))
        marked = own.read(folder(tmp_path, **{name: "\ufeff" + text for name, text in files.items()}))
        assert marked == plain and plain.splits["train"]


def test_lines_end_as_they_do_anywhere_and_no_other_character_ends_one(tmp_path):
    """A vertical tab, U+0085 and U+2028 are line ends for str.splitlines; in a text they are characters."""
    for text in ("a\x0bfine\x85film", "a fine\u2028film"):
        for end in ("\n", "\r\n", "\r"):
            rows = f"t\tl{end}{text}\t1{end}{end}x\t0{end}"
            data = own.read(folder(tmp_path, train_tsv=rows, dev_tsv=rows))
            assert data.splits["dev"] == [(text, ["1"]), ("x", ["0"])], end


def test_only_one_kind_of_file_lies_in_a_folder_and_nothing_there_is_passed_over(tmp_path):
    both = {"train_tsv": TSV, "dev_tsv": TSV}
    refused(folder(tmp_path, **both, test_jsonl=JSONL), "test.jsonl beside train.tsv; one kind of file is read")
    refused(folder(tmp_path, **both, train_csv=CSV), "train.csv beside train.tsv")
    template = '{"template": "{text} [MASK]", "words": {}}'
    refused(folder(tmp_path, train_jsonl=JSONL, dev_jsonl=JSONL, template_json=template), "only read beside tsv files")
    for name in ("template.json", "test.tsv", "dev.tsv"):
        path = folder(tmp_path / f"with {name}", **both)
        (path / name).unlink(missing_ok=True)
        (path / name).mkdir()
        refused(path, f"{name}: not a regular file")
        (path / name).rmdir()
        (path / name).symlink_to("nowhere")
        refused(path, f"{name}: no such file")


# ---- tables ----

def test_the_first_line_is_never_lost_as_a_header(tmp_path):
    rows = TSV.split("\n", 1)[1]
    refused(folder(tmp_path, train_tsv=rows, dev_tsv=TSV), "train.tsv, line 1: '1' is a label", "must be a header")
    refused(folder(tmp_path, train_tsv=TSV, dev_tsv=rows), "dev.tsv, line 1: '1' is a label")
    refused(folder(tmp_path, train_tsv=TSV, dev_tsv=TSV, test_tsv="\n" + rows), "test.tsv, line 2: '1' is a label")
    words = TSV.replace("\t1", "\tgood").replace("\t0", "\tbad")
    refused(folder(tmp_path, train_tsv=words, dev_tsv="x\tgood\ny\tbad\n"), "dev.tsv, line 1: 'good' is a label")
    refused(folder(tmp_path, train_tsv="x\t-0.5\n" + words, dev_tsv=words), "train.tsv, line 1: '-0.5' is a label")


def test_labels_in_the_first_column_are_seen_and_the_message_is_short(tmp_path):
    rows = [f"{'spam' if i % 7 == 0 else 'ham'}\tmessage {i}: are we still on for tonight\n" for i in range(5000)]
    for train, dev in ((rows[:4000], rows[4000:]), (["v1\tv2\n", *rows], ["v1\tv2\n", *rows])):
        folder(tmp_path, train_tsv="".join(train), dev_tsv="".join(dev))
        refused(tmp_path, "train.tsv, line 1: ", "for 2 different texts; are the columns swapped?", " more) for")
    data = own.read(folder(tmp_path, train_tsv="t\tl\nx\t1\nx\t0\n", dev_tsv=TSV))
    assert data.labels == ["0", "1"], "one text, two labels: noise, but no label comes first"
    many = "t\tl\n" + "".join(f"text {i}\tlabel {i}\n" for i in range(50))
    refused(folder(tmp_path, train_tsv=many, dev_tsv="t\tl\nx\tnew\n"), "dev.tsv, line 2: label 'new' is not in the",
            "which has label 0, label 1, label 10, label 11, label 12, label 13, ", ", label 17 and 40 more")


def test_pairs_of_sentences_are_refused_as_such(tmp_path):
    pairs = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n"
    refused(folder(tmp_path, train_tsv=pairs, dev_tsv=pairs), "train.tsv, line 1: 4 columns (index, sentence1, "
            "sentence2, label); only text, tab, label is read, and no pairs of sentences")
    refused(folder(tmp_path, train_tsv=TSV + "a\tb\t1\n", dev_tsv=TSV), r"line 4: 'a\tb\t1' is not text, one tab")


def test_quotes_in_a_tsv_are_a_spreadsheets_or_the_texts_own(tmp_path):
    quoted = {'"He said ""no"" to it"': 'He said "no" to it', '"""fine"""': '"fine"'}  # as pandas writes
    alone = '"so so', 'fine"', '"fine" film', '"fine"', 'a "fine" one', '"" fine ""'  # as GLUE has them
    for cell, text in (quoted | dict(zip(alone, alone))).items():
        rows = TSV + f"{cell}\t1\n"
        assert own.read(folder(tmp_path, train_tsv=rows, dev_tsv=rows)).splits["train"][2] == (text, ["1"]), cell
    rows = '"text"\t"label"\n"a ""fine"" film"\t"good"\n"dull"\t"bad"\n'                               # all are quoted
    data = own.read(folder(tmp_path, train_tsv=rows, dev_tsv=rows))
    assert data.splits["dev"] == [('a "fine" film', ["good"]), ("dull", ["bad"])] and data.labels == ["bad", "good"]


def test_a_quote_too_many_in_a_csv_never_swallows_a_row(tmp_path):
    good = own.read(folder(tmp_path, train_csv=CSV + '"name[C]","C says ""hi"",\nand ""bye""."\n', dev_csv=CSV))
    assert good.splits["train"][2] == ("name[C]", ['C says "hi",\nand "bye".']), "a cell may have quotes and lines"
    for row in ('"name[C]","C is bad.\n"name[D]","D is fine."\n', '"name[C]","C is bad.\n', '"name[C]","C" is bad.\n',
                'name[C]","C is bad."\n', '"name[C]",C is bad."\n'):
        refused(folder(tmp_path, train_csv=CSV + row, dev_csv=CSV), "train.csv, line 4: ", "is a quote not closed?")
    long = f'"name[C]","{"C is bad. " * 20_000}"\n'
    refused(folder(tmp_path, train_csv=CSV + long, dev_csv=CSV), "train.csv, line 4: field larger than field limit")


def test_a_json_line_says_each_thing_once_and_in_whole_characters(tmp_path):
    for line, why in (('{"prompt": "a", "prompt": "b", "completion": "c"}', "'prompt' stands twice"),
                      (r'{"prompt": "a\ud83d", "completion": "c"}', "half a character"),
                      ('{"prompt": "a", "completion": "\\u001b[2J"', "not JSON: Expecting ',' delimiter (column 42)"),
                      ("[" * 100_000, "nested too deeply")):
        refused(folder(tmp_path, train_jsonl=JSONL + line, dev_jsonl=JSONL), "train.jsonl, line 2: ", why)
    row = r'{"prompt": "\ud83d\ude00", "completion": "c", "id": 7}'
    data = own.read(folder(tmp_path, train_jsonl=row, dev_jsonl=JSONL))
    assert data.splits["train"] == [("\U0001f600", ["c"])], "a whole pair; and more than is read"


def test_control_characters_of_a_label_do_not_reach_the_terminal(tmp_path):
    refused(folder(tmp_path, train_tsv=TSV, dev_tsv=TSV + "x\t\x1b[31mred\n"), r"line 4: label '\x1b[31mred' is not in")
    refused(folder(tmp_path, train_tsv=TSV + "\x1b[2J\n", dev_tsv=TSV), r"line 4: '\x1b[2J' is not text, one tab")


# ---- a test file without answers ----

def test_glues_test_file_has_no_labels_and_dev_is_reported(tmp_path):
    path = tmp_path / "SST-2"
    for test in ("index\tsentence\n0\tuneasy mishmash\n1\tfine\n", "sentence\tlabel\nuneasy\t-1\nfine\t-1\n"):
        task = load_task("x", PLAIN, GPT, data=folder(path, train_tsv=TSV, dev_tsv=TSV, test_tsv=test))
        assert task.test == [] and task.reported == task.dev != []
        assert task.about == f"from {path}; test.tsv has no answers: dev is reported"
    for name, rows, test in (("jsonl", JSONL, '{"prompt": "c"}\n' * 2), ("csv", CSV, "MR\nname[C]\n")):
        files = {f"train_{name}": rows, f"dev_{name}": rows, f"test_{name}": test}
        data = own.read(folder(path, **files))
        assert data.splits["test"] == [] and data.about.endswith(f"test.{name} has no answers: dev is reported")
        refused(folder(path, **files | {f"dev_{name}": test}), f"dev.{name}, line 1: no ")
    refused(folder(path, train_tsv=TSV, dev_tsv="index\tsentence\n0\tx\n"), "dev.tsv, line 1: no labels in the columns")
    signs = TSV.replace("\t0", "\t-1")
    data = own.read(folder(path, train_tsv=signs, dev_tsv=signs, test_tsv="t\tl\nx\t-1\n"))
    assert data.splits["test"] == [("x", ["-1"])], "here -1 is a label like any other"


# ---- strings are joined first ----

def test_a_text_stands_in_a_template_as_in_any_other_string():
    """"the soup" at the start of a text and behind other words are different tokens; so is a word at an end."""
    whole = PLAIN.encode("we went to the golden fork . the soup was fine . it was")
    for text in ("the soup was fine .", " the soup was fine . "):
        made = Encoder(PLAIN, GPT).cloze(text, [], "we went to the golden fork . {text} it was [MASK] .", 7)
        assert made.ids == whole and made.targets == [-100] * (len(whole) - 1) + [7]
        made = Encoder(WORLD, BERT).cloze(text, [], "we went to the golden fork . {text} it was [MASK] .", 7)
        assert made.ids == [WORLD.bos, *whole, WORLD.mask, *WORLD.encode(" ."), WORLD.eos]
        assert Encoder(PLAIN, GPT).classified(text, [], 0).ids == PLAIN.encode("the soup was fine .")
    assert Encoder(PLAIN, GPT).cloze("fine", [], "it was {text}?![MASK]", 7).ids == PLAIN.encode("it was fine?!")


def test_a_label_word_is_the_token_that_follows_its_template():
    encoder = Encoder(PLAIN, GPT)
    assert [encoder.word("good")] == [encoder.word("good", " it was ")] == PLAIN.encode(" good")
    assert [encoder.word("?", " fine")] == PLAIN.encode("?") != PLAIN.encode(" ?")
    with pytest.raises(Refused, match=r"template: label word 'good' is \d tokens here; choose a word that is one"):
        encoder.word("good", "(")


def test_a_prompt_gets_a_space_only_where_a_text_would_have_one():
    for prompt, completion, joined in (("rate the soup :", "good", "rate the soup : good"),
                                       ("rate the soup :", " good", "rate the soup : good"),
                                       ("rate the soup : ", "good", "rate the soup : good"),
                                       ("rate it :\n", "good", "rate it :\ngood"), ("1+1=", "2", "1+1=2"),
                                       ("2", "4", "2 4"), ("今天", "好", "今天好"), ("今天天气:", "好", "今天天气:好"),
                                       ("ดี", "มาก", "ดีมาก"), ("오늘", "좋다", "오늘 좋다")):
        made = Encoder(PLAIN, GPT).completed(prompt, [completion])
        assert PLAIN.decode(made.ids) == joined and made.ids == PLAIN.encode(joined)
        assert tasks.prompt(made)[0] == PLAIN.encode(prompt.rstrip()), "what is read does not depend on the answer"
        assert PLAIN.decode([t for t in made.targets if t not in (-100, PLAIN.eos)]) == joined[len(prompt.rstrip()):]
        assert made.answers == [completion.strip()]


def test_where_one_token_would_span_prompt_and_answer_the_prompt_is_read_as_it_is():
    """Bytes are the tokens here, and "==" is one (256): a prompt that ends in "=" may be answered by "=2" or by "2"."""
    ranks = {bytes([n]): n for n in range(256)} | {b"==": 256}
    encoding = tiktoken.Encoding("==", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<end>": 257})
    encoder = Encoder(tokenizers.BPE(encoding, eos=257), GPT)
    assert encoder.tokenizer.encode("1==2") == [49, 256, 50]
    assert encoder.completed("1=", ["=2"]).ids == [49, 61, 61, 50]
    assert encoder.completed("1=", ["2"]).ids == [49, 61, 50]


# ---- label words ----

def cloze_folder(path, words):
    rows = "t\tl\nthe soup was nice\tpos\nthe soup was awful\tneg\n"
    return folder(path, train_tsv=rows, dev_tsv=rows, template_json=json.dumps(
        {"template": "{text} it was [MASK] .", "words": words}))


def test_two_labels_never_have_one_word(tmp_path):
    path = cloze_folder(tmp_path, {"pos": "good", "neg": "good"})
    with pytest.raises(Refused, match="template.json: the labels 'neg' and 'pos' have one word here, 'good'"):
        load_task("x", PLAIN, GPT, path)
    assert load_task("x", PLAIN, Config(1024, 96, 12, 1, 3, 20, lm_head="none"), path).words is None


def test_a_word_that_the_vocabulary_lacks_is_no_label_word(tmp_path):
    """Two such words would both be [UNK]: one token each, and dev all right whatever is trained."""
    pytest.importorskip("tokenizers")
    (tmp_path / "base").mkdir()
    vocab = "[PAD] [UNK] [CLS] [SEP] [MASK] the soup was nice awful it .".split()
    (tmp_path / "base" / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    tokenizer, config = tokenizers.wordpiece_from(tmp_path / "base"), Config(12, 32, 12, 1, 3, 20, False, lm_head="mlm")
    for words, why in (({"pos": "😀", "neg": "😡"}, "label word '😡' is not in this base's vocabulary"),
                       ({"pos": "nice", "neg": "Nice"}, "'neg' and 'pos' have one word here, 'nice'"),
                       ({"pos": "nice", "neg": "it was"}, "label word 'it was' is 2 tokens here")):
        with pytest.raises(Refused, match=f"template.json: .*{why}"):
            load_task("x", tokenizer, config, cloze_folder(tmp_path / "data", words))
    task = load_task("x", tokenizer, config, cloze_folder(tmp_path / "data", {"pos": "nice", "neg": " awful "}))
    assert task.words == [vocab.index("awful"), vocab.index("nice")]


# ---- sizes ----

def test_one_long_row_among_short_ones_is_cut_and_counted(tmp_path):
    rows = "".join(json.dumps({"prompt": f"question {i}", "completion": "yes"}) + "\n" for i in range(9))
    for long in ({"prompt": "why", "completion": "because " * 40}, {"prompt": "why " * 300, "completion": "yes"},
                 {"prompt": "why " * 300, "completion": "because " * 40}):
        task = load_task("x", PLAIN, GPT, folder(tmp_path, train_jsonl=rows + json.dumps(long), dev_jsonl=rows))
        assert task.cut == 1 and max(len(e.ids) for e in task.train) == GPT.n_ctx - 1
        assert any(t != -100 for t in task.train[-1].targets) and task.train[-1].targets[0] == -100
    for tokenizer, config in ((PLAIN, GPT), (WORLD, BERT)):
        long = TSV + "so " * 500 + "\t1\n"
        task = load_task("x", tokenizer, config, folder(tmp_path, train_tsv=long, dev_tsv=TSV))
        assert task.cut == 1 and len(task.train[-1].ids) == config.n_ctx
        fits = TSV + "so " * (config.n_ctx - len(tokenizer.wrap([]))) + "\t1\n"
        task = load_task("x", tokenizer, config, folder(tmp_path, train_tsv=fits, dev_tsv=TSV))
        assert task.cut == 0 and len(task.train[-1].ids) == config.n_ctx, "as long as the model reads"


def test_a_hundred_thousand_labels_are_read_in_seconds(tmp_path):
    rows = "t\tl\n" + "".join(f"text {i}\tlabel {i}\n" for i in range(100_000))
    task = load_task("x", PLAIN, GPT, folder(tmp_path, train_tsv=rows, dev_tsv="t\tl\nx\tlabel 7\n"), examples=10)
    assert task.classes == 100_000 and task.majority == 0
    assert task.dev[0].targets[-1] == task.labels.index("label 7")


def test_the_world_says_at_once_how_much_it_makes():
    for name, most in (("sentiment", 100_000), ("corpus", 1_000_000)):
        with pytest.raises(Refused, match=f"examples=1,000,000,000: the world makes {most:,} at most"):
            load_task(name, PLAIN, GPT, examples=10**9)


# ---- scores ----

def test_words_are_counted_and_a_script_without_spaces_by_its_characters():
    task = Task("t", [], [], [], metric="overlap")
    for wanted, got, score in (
            ("今天天气很好，我们去公园。", "今天天气很好，我们去公园", 100 * 2 * 12 / (13 + 12)),
            ("ดีมาก", "ดีมา", 100 * 2 * 4 / (5 + 4)), ("GPT 很好", "gpt 好", 100 * 2 * 2 / (3 + 2)),
            ("yes", "yes yes yes yes", 100 * 2 * 1 / (1 + 4)), ("no no", "no", 100 * 2 * 1 / (2 + 1)),
            ("좋은 영화", "좋은 날", 50), ("the red fox", "The RED fox", 100), ("a b", "", 0)):
        assert tasks.score(task, [Example([], [], "", [wanted])], [got]) == pytest.approx(score), (wanted, got)


def test_bleu_counts_characters_where_words_have_no_spaces():
    pytest.importorskip("sacrebleu")
    wanted = [Example([], [], "", ["今天天气很好，我们去公园。"])]
    assert bleu(wanted, ["今天天气很好，我们去公园。"]) == "BLEU 100.0"
    assert bleu(wanted, ["今天天气很好，我们去公园"]) == "BLEU 92.0", "brevity alone: e^(1 - 13/12)"


def test_no_is_a_word_and_not_the_beginning_of_one():
    yes, no = "name[The Mill], familyFriendly[yes]", "name[The Mill], familyFriendly[no]"
    for text in ("The Mill, north of the river, welcomes families.", "The Mill serves noodles and welcomes children.",
                 "The Mill is known for notable kid-friendly food, second to none; a child's dream"):
        assert "familyFriendly" in own.stated(text, yes) and "familyFriendly" not in own.stated(text, no), text
    for text in ("The Mill is no place for kids", "The Mill is non-family-friendly", "The Mill isn't for children"):
        assert "familyFriendly" in own.stated(text, no) and "familyFriendly" not in own.stated(text, yes), text
    for text in ("The Mill serves kidney pie", "The Mill is a familiar place"):
        assert own.stated(text, yes) == own.stated(text, no) == {"name": "The Mill"}, text
    assert own.stated("it is slow, and highly priced", "price[low], rating[high]") == {"rating": "high"}


def test_logits_that_are_not_finite_are_scored_by_nobody():
    class Says(torch.nn.Module):
        config = GPT

        def __init__(self, value):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor([1.0, value]))

        def forward(self, ids, keep, at):
            return self.value.expand(at.sum(), 2)
    rows = [Example([1], [0], "", ["a"])]
    task = Task("t", rows, rows, rows, labels=["a", "b"])
    for value in (float("nan"), float("inf"), -float("inf")):
        for look in (lambda model: tasks.dev_score(model, task, rows, 0), lambda model: tasks.loss(
                model, task, tasks.collate(rows, 0)), lambda model: tasks.predictions(model, task, rows, PLAIN)):
            with pytest.raises(NotFinite):
                look(Says(value))
    assert tasks.dev_score(Says(0.0), task, rows, 0) == 100
