"""What a count means in bytes and FLOPs, on paper-sized numbers; and what eval.py costs prints."""

import csv
from dataclasses import replace

import pytest
import torch
from tiny import GPT
from torch.utils.flop_counter import FlopCounterMode

from deltas import attach, matrix_entries
from lab import costs
from lab.sizes import SIZES
from methods.adapter import Adapter
from methods.bitfit import BitFit
from methods.full import Full
from methods.intrinsic import Intrinsic
from methods.last_layer import LastLayer
from methods.lora import LoRA
from methods.mask import Mask
from methods.prefix import Prefix
from methods.prompt import Prompt
from model import Refused, Transformer

THREE = replace(GPT, n_layer=3, lm_head="none")  # its matrices have 3 (4 x 12 x 12 + 2 x 12 x 20) = 3168 entries


# ---- bytes ----

def test_the_memory_of_ten_weights_of_which_two_are_trained():
    assert costs.training_memory(10, 2, "fp32") == {"weights": 40, "gradients": 8, "optimizer": 16}
    assert costs.training_memory(10, 2, "mixed") == {"weights": 16 + 12, "gradients": 4, "optimizer": 16}
    assert costs.training_memory(10, 2, "bf16") == {"weights": 20, "gradients": 4, "optimizer": 8}


def test_full_fine_tuning_takes_sixteen_bytes_a_weight_and_a_card_of_80_gb_holds_five_billion_of_them():
    assert sum(costs.training_memory(1000, 1000, "fp32").values()) == 16 * 1000
    assert sum(costs.training_memory(1000, 1000, "mixed").values()) == 16 * 1000
    assert costs.largest(80, "fp32", full=True) == 5e9
    assert costs.largest(80, "bf16", full=False) == 40e9


def test_the_lora_of_gpt3_is_stored_in_38_megabytes_and_gpt3_in_349_gigabytes():
    assert costs.stored_bytes(LoRA(rank=4).formula(SIZES["gpt3-175b"])) == 37_748_736
    base = Full().formula(SIZES["gpt3-175b"])
    assert (costs.stored_bytes(base), costs.stored_bytes(base, 32)) == (349_208_518_656, 698_417_037_312)


def test_a_dense_projection_is_out_of_reach_where_fastfood_is_not():
    dense, fastfood = costs.projection(330_000_000, 1000).values()
    assert dense == (1_320_000_000_000, 660_000_000_000)      # 1.3 TB
    assert fastfood == (7 * 330_000_000, 2 * 330_000_000 * 10)  # 2.3 GB, 100 times fewer operations


def test_a_permutation_takes_one_two_or_four_bytes_an_entry():
    """Beside one byte of signs and four of Gaussians; d is padded to a power of two."""
    lengths = 2**8, 2**8 + 1, 2**15, 2**15 + 1
    assert [costs.projection(1, d)["fastfood"][0] - 5 for d in lengths] == [1, 2, 2, 4]


def test_intrinsic_is_small_on_disk_and_larger_than_full_fine_tuning_in_memory():
    row = costs.row("gpt2", Intrinsic(dim=1000))
    D, blocks = 124_439_808, 121_524  # of 1024
    assert row["stored_fp32"] == 4000
    assert row["memory_fp32"] == 4 * (D + 1000) + 12 * 1000 + 2 * 4 * D + 7 * 1024 * blocks
    assert row["memory_mixed"] == 2 * D + 16 * 1000 + 2 * 4 * D + 7 * 1024 * blocks  # theta is in fp32 there
    assert row["memory_bf16"] == 2 * (D + 1000) + 6 * 1000 + 2 * 2 * D + 7 * 1024 * blocks


def test_a_mask_stores_a_value_and_a_place_of_four_bytes_for_each_weight_that_trains():
    row = costs.row("gpt2", Mask(k=1000))
    assert (row["stored"], row["stored_fp16"], row["stored_fp32"]) == (1000, 6000, 8000)
    assert row["memory_fp32"] == 3 * 4 * 124_439_808 + 16 * 1000 + 4 * 1000


def test_the_memory_of_any_other_delta_is_the_base_and_twelve_bytes_more_for_each_of_its_parameters():
    row = costs.row("gpt2", LoRA(rank=8))
    assert row["memory_fp32"] == 4 * (124_439_808 + 294_912) + 12 * 294_912


def test_a_prefix_is_trained_with_its_mlp_and_stored_without():
    row = costs.row("gpt2", Prefix(length=10, mlp=True))
    assert row["stored"] == row["stored_formula"] == 184_320 and row["stored_fp16"] == 368_640
    assert row["trained"] == row["formula"] == 10 * 768 + 768 * 512 + 512 + 2 * 12 * 768 * 513


# ---- FLOPs ----

def measured_flops(delta, text, soft):
    """FLOPs of one forward and one backward, counted by PyTorch, less the scores of attention: (forward, both)."""
    model, batch = attach(delta, Transformer(THREE)), 2
    counter = FlopCounterMode(display=False)
    with counter:
        out = model(torch.zeros(batch, text, dtype=torch.long))
        forward = counter.get_total_flops()
        out.sum().backward()
    scores = 3 * 4 * batch * (soft + text) ** 2 * 12  # in every block, two products of 2 T T d
    return (forward - scores) / (batch * text), (counter.get_total_flops() - 3 * scores) / (batch * text)


@pytest.mark.parametrize("delta, soft, unmerged, saved", [
    (Full(), 0, 0, 0),
    (BitFit(), 0, 0, 0),
    (LastLayer(k=2), 0, 0, 2 * 240),            # the scores of the one frozen block
    (LoRA(rank=2), 0, 2 * 288, 864 + 96 + 120),  # gradients of what enters query, key, value; both A; of the keys
    (Adapter(2), 0, 0, 0),
    (Prompt(length=3), 3, 0, 0),
    (Prefix(length=3), 0, 0, 864 + 192),  # gradients of what enters query, key, value; of the queries
], ids=lambda x: getattr(x, "name", ""))
def test_the_flops_of_a_technique_are_those_of_its_code(delta, soft, unmerged, saved):
    """Training saves a little more than the formula says: the lowest trained block hands no gradient on."""
    forward, training = delta.flops(THREE, text=5)
    assert measured_flops(delta, 5, soft) == pytest.approx((forward + unmerged, training - saved), rel=1e-12)


def test_in_intrinsic_each_token_costs_what_it_costs_in_full_fine_tuning():
    assert Intrinsic(dim=50).flops(THREE, 5) == Full().flops(THREE, 5) == (2 * 3168, 6 * 3168)
    assert Mask(k=50).flops(THREE, 5) == (2 * 3168, 6 * 3168), "and so in a mask"
    assert matrix_entries(THREE) == 3168


def test_training_a_delta_saves_a_third_of_the_flops_and_training_the_last_quarter_half():
    config = SIZES["gpt2-medium"]
    _, full = Full().flops(config, 512)
    assert 0.666 < LoRA(rank=4).flops(config, 512)[1] / full < 0.68
    assert LastLayer(k=6).flops(config, 512)[1] / full == 0.5


# ---- the command ----

def test_an_unknown_model_or_field_is_named_with_what_would_be_right():
    with pytest.raises(Refused, match="'gpt5': choose from gpt2"):
        costs.size("gpt5")
    with pytest.raises(Refused, match="--set rnk=8: write FIELD=VALUE, the field one of .*rank"):
        costs.changes(["rnk=8"], ["lora"])


@pytest.mark.parametrize("line, why", [
    *((f"--card 24 {card}", f"--card {card}: the memory of a card is a number of GB above 0")
      for card in ("nan", "inf", "0", "-1")),
    ("--set rank=1" + 12 * "0", "more than a hundred times as many as the base has"),
    ("--set alpha=nan", "alpha=nan: choose a finite number"), ("--set rank", "--set rank: write FIELD=VALUE"),
    ("--set rank=4 rank=8", "--set rank=8: rank is set already"),
    ("--method lora --set length=5", "--set length=5: .*alpha, rank, targets"),
    ("--set rank=", "rank=: rank is a whole"),
    ("--model gpt2 gpt2", "--model gpt2,gpt2: gpt2 is there twice"), ("--model gpt2 --model t5", "twice|'t5'"),
    ("--method lora lora", "--method lora,lora: lora is there twice"), ("--csv", "expected one argument"),
    ("--check --model gpt2", "--check and --model: .* name one of them"),
    ("--csv FOLDER", "--csv FOLDER: a folder stands there"), ("--csv=", "csv '': an empty text is no value"),
])
def test_what_costs_cannot_count_is_named_and_nothing_is_written(line, why, tmp_path, monkeypatch):
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=why):
        costs.main(line.split() + ["--model", "gpt2"] * ("--model" not in line and "--csv" not in line))
    assert [p.name for p in tmp_path.iterdir()] == ["FOLDER"]


def test_the_command_prints_and_writes_what_was_asked_for(tmp_path, capsys):
    costs.main(["--model", "gpt2", "--method", "full", "lora", "--set", "rank=8", "--card", "1", "--csv",
                str(tmp_path / "costs.csv")])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 110
    assert "124,439,808 parameters, a copy 248.9 MB in 16 bits, 497.8 MB in 32" in printed
    assert printed.count("agrees") == 2 and "DIFFERS" not in printed
    with open(tmp_path / "costs.csv", encoding="utf-8") as file:
        full, lora = csv.DictReader(file)
    assert lora["trained"] == lora["formula"] == "294912" and lora["settings"] == ""
    assert int(full["memory_fp32"]) == 16 * 124_439_808
    full, lora = ([line.split() for line in printed.splitlines() if line.startswith(name)][1]
                  for name in ("full", "lora"))
    assert full == "full 2.0 GB 2.0 GB 995.5 MB 169.9 MF 509.6 MF 1.00 bf16".split()  # what fits on 1 GB
    assert lora == "lora 502.5 MB 253.6 MB 251.2 MB 169.9 MF 341.5 MF 0.67 all three".split()
    assert "gpt2 497.8 GB 248.9 GF 871.1 MB 2.5 G" in " ".join(printed.split())  # P z, dense and by Fastfood


def test_a_technique_stands_in_its_papers_setting_unless_told_otherwise():
    assert costs.in_paper(LoRA, {}) == LoRA(rank=4)                            # Hu et al.; our default is 8
    assert costs.in_paper(LoRA, {"rank": 16, "length": 3}) == LoRA(rank=16)    # length is no field of LoRA
    assert costs.settings(LoRA(rank=4, targets="value")) == "rank=4 targets=value"
