"""Your own data: what the three formats look like, and that every bad row is named by file and line."""

import json
import os
from pathlib import Path

import pytest

from data import own

TSV = "text\tlabel\nthe soup was fine\tgood\nthe soup was cold\tbad\n"


def folder(path, **files):
    """Files by name (train_tsv for train.tsv) in a new folder."""
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        (path / name.replace("_", ".")).write_bytes(data)
    return path


def refused(path, *parts):
    with pytest.raises(ValueError) as error:
        own.read(path)
    for part in parts:
        assert part in str(error.value)


# ---- tsv: labels ----

def test_tsv_is_a_header_then_text_tab_label(tmp_path):
    data = own.read(folder(tmp_path, train_tsv=TSV, dev_tsv="sentence\tclass\n\nnot bad\t good \n"))
    assert data.splits == {"train": [("the soup was fine", ["good"]), ("the soup was cold", ["bad"])],
                           "dev": [("not bad", ["good"])], "test": []}
    assert data.labels == ["bad", "good"] and data.words == [] and data.template == ""
    assert data.name == tmp_path.name


def test_labels_may_be_anything_and_lines_may_end_as_on_windows(tmp_path):
    data = own.read(folder(tmp_path, train_tsv="t\tl\r\nça va\t1\r\n\"so so\t-1\r\n", dev_tsv="t\tl\nx\t1\n",
                           test_tsv="t\tl\ny\t-1\n"))
    assert data.splits["train"] == [("ça va", ["1"]), ('"so so', ["-1"])]
    assert data.splits["test"] == [("y", ["-1"])]
    assert data.labels == ["-1", "1"]


def test_a_bad_row_of_a_tsv_is_named(tmp_path):
    for line in ("no tab here", "two\ttabs\there", "\tgood", "a text\t ", "  \tgood"):
        folder(tmp_path, train_tsv=TSV + line + "\n", dev_tsv=TSV)
        refused(tmp_path, f"train.tsv, line 4: {line!r} is not text, one tab, label")


def test_the_line_number_counts_empty_lines_too(tmp_path):
    folder(tmp_path, train_tsv=TSV, dev_tsv="text\tlabel\n\n\nbroken\n")
    refused(tmp_path, "dev.tsv, line 4:")


def test_the_header_is_a_row_of_two_as_well(tmp_path):
    refused(folder(tmp_path, train_tsv="only text\n" + TSV, dev_tsv=TSV), "train.tsv, line 1:")


def test_a_file_must_have_rows_and_two_labels(tmp_path):
    refused(folder(tmp_path, train_tsv="text\tlabel\n", dev_tsv=TSV), "train.tsv: no rows")
    refused(folder(tmp_path, train_tsv="text\tlabel\nx\tgood\ny\tgood\n"), "train.tsv: one label only, 'good'")


def test_a_label_that_training_never_saw_is_named(tmp_path):
    folder(tmp_path, train_tsv=TSV, dev_tsv=TSV, test_tsv=TSV + "so so\tmiddling\n")
    refused(tmp_path, "test.tsv, line 4", "'middling'", "bad, good")


def test_a_file_in_another_encoding_is_named(tmp_path):
    refused(folder(tmp_path, train_tsv=b"t\tl\n\xe7a va\tgood\n", dev_tsv=TSV), "train.tsv", "not UTF-8", "byte 4")


# ---- which files ----

def test_what_is_missing_is_named(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: no such folder")
    refused(tmp_path, "holds none of train.tsv, train.jsonl, train.csv")
    refused(folder(tmp_path, train_tsv=TSV), "dev.tsv: missing")


# ---- template.json: label words for a base with an LM head ----

def template(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (path / "template.json").write_text(text, encoding="utf-8")
    return folder(path, train_tsv=TSV, dev_tsv=TSV)


def test_a_template_gives_each_label_a_word_in_the_order_of_the_labels(tmp_path):
    data = own.read(template(tmp_path, {"template": "{text} It was [MASK].", "words": {"good": "fine", "bad": "sad"}}))
    assert data.template == "{text} It was [MASK]." and data.words == ["sad", "fine"]


def test_a_template_that_cannot_be_used_says_why(tmp_path):
    words = {"good": "a", "bad": "b"}
    for content, why in (
            ("{", "not JSON: Expecting property name"), ([1], "an object is expected here, not [1]"),
            ({"words": words}, "has no 'template'"), ({"template": 7, "words": words}, "template is 7, not a text"),
            ({"template": "{text} [MASK]"}, "has no 'words'"),
            ({"template": "{text} [MASK]", "words": ["a", "b"]}, "words is ['a', 'b'], not an object"),
            ({"template": "{text} [MASK]", "words": {"good": "fine"}}, "word for each of the labels bad, good, and"),
            ({"template": "{text} [MASK]", "words": words | {"ugly": "c"}}, "and no other; it has {'good'"),
            ({"template": "{text} [MASK]", "words": {"good": "a", "bad": 2}}, "it has {'good': 'a', 'bad': 2}"),
            ({"template": "{text} [MASK]", "words": {"good": "a", "bad": " "}}, "one word for each of the labels"),
            ({"template": "It was [MASK]", "words": words}, "needs {text} once and [MASK] once"),
            ({"template": "{text} It was", "words": words}, "needs {text} once and [MASK] once"),
            ({"template": "{text} {text} [MASK]", "words": words}, "needs {text} once"),
            ({"template": "[MASK]: {text}", "words": words}, "must have [MASK] behind {text}")):
        refused(template(tmp_path, content), "template.json", why)


# ---- jsonl: prompts and completions ----

def rows(*pairs):
    return "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs)


def test_jsonl_is_a_prompt_and_a_completion_a_line(tmp_path):
    data = own.read(folder(tmp_path, train_jsonl=rows(("2+2", "4"), ("2+2", "four")),
                           dev_jsonl=rows(("1+1", "2"), ("3+3", "6"), ("1+1", "two"))))
    assert data.splits["train"] == [("2+2", ["4"]), ("2+2", ["four"])]          # each is one to learn from
    assert data.splits["dev"] == [("1+1", ["2", "two"]), ("3+3", ["6"])]        # one prompt, two right answers
    assert data.labels == [] and data.metric == "overlap"


def test_a_bad_row_of_a_jsonl_is_named(tmp_path):
    for line, why in (
            ("{not json", "not JSON"), ('{"prompt": "a"}', "has no 'completion'"),
            ("3", "an object is expected here, not 3"), ('["a", "b"]', "an object is expected here, not ['a', 'b']"),
            ('{"prompt": "a", "completion": " "}', "not empty"),
            ('{"prompt": 7, "completion": "b"}', "prompt is 7, not a text"),
            ('{"prompt": "a", "completion": null}', "completion is None, not a text")):
        folder(tmp_path, train_jsonl=rows(("a", "b")), dev_jsonl=rows(("a", "b"), ("c", "d")) + line + "\n")
        refused(tmp_path, "dev.jsonl, line 3:", why)


# ---- csv: E2E ----

E2E = 'mr,ref\n"name[Aromi], food[Indian]","Aromi is Indian."\n"name[Aromi], food[Indian]",Try Aromi.\n'


def test_csv_is_e2es_mr_and_ref(tmp_path):
    data = own.read(folder(tmp_path, train_csv=E2E, dev_csv=E2E))
    assert data.splits["train"] == [("name[Aromi], food[Indian]", ["Aromi is Indian."]),
                                    ("name[Aromi], food[Indian]", ["Try Aromi."])]
    assert data.splits["dev"] == [("name[Aromi], food[Indian]", ["Aromi is Indian.", "Try Aromi."])]
    assert data.metric == "attributes"


def test_a_bad_row_of_a_csv_is_named(tmp_path):
    for content, why in (
            ("mr;ref\na;b\n", "line 1: the columns are mr;ref, not mr,ref"), ("", "no rows"),
            ("mr,ref,ref\na,b,c\n", "line 1: the columns are mr, ref, ref, not mr,ref"),
            (E2E + "name[X],\n", "line 4: name[X],  is not an mr with slots such as name[Aromi], and a ref"),
            (E2E + "a prompt,a text\n", "line 4: a prompt, a text is not an mr with slots"),
            (E2E + "alone\n", "line 4: 1 cells, alone; the header has 2"),
            (E2E + "name[X],good, and cheap\n", "line 4: 3 cells, name[X], good,  and cheap; the header has 2"),
            ("mr,ref\n", "no rows"), (b"mr,ref\n\xe7a,va\n", "not UTF-8")):
        refused(folder(tmp_path, train_csv=content, dev_csv=E2E), "train.csv", why)


def test_the_reader_program_finds_what_a_text_states():
    mr = "name[The Mill], food[Thai], familyFriendly[no], area[riverside]"
    assert own.slots(mr) == {"name": "The Mill", "food": "Thai", "familyFriendly": "no", "area": "riverside"}
    assert own.stated("The Mill serves Thai food and is not for children.", mr) == {
        "name": "The Mill", "food": "Thai", "familyFriendly": "no"}
    assert own.stated("the mill, by the riverside, welcomes kids", mr) == {"name": "The Mill", "area": "riverside"}
    yes = "familyFriendly[yes]"
    assert own.stated("children are welcome", yes) == {"familyFriendly": "yes"}
    assert own.stated("not for children", yes) == {} and own.stated("a quiet place", yes) == {}


def test_e2es_own_file_names_do_as_well(tmp_path):
    for name in ("trainset.csv", "devset.csv", "testset_w_refs.csv"):
        (tmp_path / name).write_text(f'mr,ref\n"name[{name}]","It is called {name}."\n', encoding="utf-8")
    data = own.read(tmp_path)
    assert data.splits["train"] == [("name[trainset.csv]", ["It is called trainset.csv."])]
    assert data.splits["dev"][0][0] == "name[devset.csv]" and data.splits["test"][0][0] == "name[testset_w_refs.csv]"


def test_real_e2e_prompts_have_several_right_completions(tmp_path):
    folder = os.environ.get("DELTA_DATA")
    if folder is None:
        pytest.skip("DELTA_DATA names no folder with e2e/ in it")
    for name in ("devset.csv", "testset_w_refs.csv"):
        (tmp_path / name).symlink_to(Path(folder) / "e2e" / name)
    (tmp_path / "trainset.csv").symlink_to(Path(folder) / "e2e" / "devset.csv")
    data = own.read(tmp_path)
    prompt, answers = data.splits["test"][0]
    assert len(data.splits["train"]) == 4672 and len(answers) > 1 and data.metric == "attributes"
    assert "name" in own.slots(prompt) and "name" in own.stated(answers[0], prompt)


def test_no_more_examples_are_trained_on_than_there_are(tmp_path):
    from data import tasks
    from data.bases import SHAPES
    from data.tokenizers import world
    data = folder(tmp_path, train_tsv="t\tl\nsoup\t1\nfish\t0\n", dev_tsv="t\tl\nsoup\t1\n")
    task = tasks.load_task("own", world(), SHAPES["gpt-xs"], data=str(data), examples=2)
    assert [e.text for e in task.train] == ["soup", "fish"]
    with pytest.raises(ValueError, match="examples=3: .* has 2 to train on"):
        tasks.load_task("own", world(), SHAPES["gpt-xs"], data=str(data), examples=3)
