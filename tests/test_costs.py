"""What a count means in bytes and FLOPs, on paper-sized numbers; and what eval.py costs prints."""

import csv

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deltas import attach, methods
from lab import costs
from methods.adapter import Adapter
from methods.full import Full
from methods.intrinsic import Intrinsic
from methods.last_layer import LastLayer
from methods.lora import LoRA
from methods.prefix import Prefix
from methods.prompt import Prompt
from model import Config, Transformer

TINY = Config(vocab_size=17, n_ctx=16, d_model=12, n_layer=3, n_head=3, d_ff=20, lm_head="none")


def test_the_memory_of_ten_weights_of_which_two_are_trained():
    assert costs.training_memory(10, 2, "fp32") == {"weights": 40, "gradients": 8, "optimizer": 16}
    assert costs.training_memory(10, 2, "mixed") == {"weights": 16 + 12, "gradients": 4, "optimizer": 16}
    assert costs.training_memory(10, 2, "bf16") == {"weights": 20, "gradients": 4, "optimizer": 8}


def test_full_fine_tuning_takes_sixteen_bytes_a_weight_and_a_delta_four_and_twelve():
    D, T = 1000, 7
    assert sum(costs.training_memory(D, D, "fp32").values()) == 16 * D
    assert sum(costs.training_memory(D, D, "mixed").values()) == 16 * D
    assert sum(costs.training_memory(D, T, "fp32").values()) == 4 * D + 12 * T


def test_gpt3_is_350_gigabytes_a_task_and_its_lora_38_megabytes():
    lora = LoRA(rank=4).formula(costs.size("gpt3-175b"))
    assert lora == 18_874_368 and costs.stored_bytes(lora) == 37_748_736
    base = Full().formula(costs.size("gpt3-175b"))
    assert (costs.stored_bytes(base), costs.stored_bytes(base, 32)) == (349_208_518_656, 698_417_037_312)


def test_a_card_of_80_gigabytes_trains_five_billion_weights_or_carries_forty():
    assert costs.largest(80, "fp32", full=True) == 5e9
    assert costs.largest(80, "bf16", full=False) == 40e9
    assert 16 * 10e9 > 80e9  # ten billion parameters, fully tuned with Adam, are 160 GB before any activation


def measured_flops(delta, text=5, batch=2):
    """FLOPs of one forward and one backward of the real code, without attention's scores: (forward, both)."""
    model = attach(delta, Transformer(TINY))
    ids = torch.zeros(batch, text, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter:
        out = model(ids)
        forward = counter.get_total_flops()
        out.sum().backward()
    scores = 4 * batch * text * text * TINY.d_model * TINY.n_layer  # two products of 2 T T d
    return (forward - scores) / (batch * text), (counter.get_total_flops() - 3 * scores) / (batch * text)


def test_the_flops_of_full_fine_tuning_are_two_and_six_n():
    n = 3 * (4 * 12 * 12 + 2 * 12 * 20)
    assert costs.flops_per_token(TINY, Full()) == {"forward": 2 * n, "training": 6 * n}
    assert measured_flops(Full()) == (2 * n, 6 * n)


def test_the_flops_of_an_adapter_are_four_n_and_its_own():
    flops, n = costs.flops_per_token(TINY, Adapter(2)), 3 * (4 * 12 * 12 + 2 * 12 * 20)
    own = 3 * 2 * (2 * 12 * 2)  # blocks, places, two matrices of 12 x 2
    assert flops == {"forward": 2 * n + 2 * own, "training": 4 * n + 6 * own}
    forward, both = measured_flops(Adapter(2))
    assert forward == flops["forward"]
    # In the lowest block attention's backward is saved, since nothing below or in it is trained but the norm.
    assert flops["training"] - 6 * n / 3 <= both <= flops["training"]


@pytest.mark.parametrize("delta", [LoRA(rank=2), LastLayer(k=2)], ids=["lora", "last_layer"])
def test_the_flops_of_training_are_the_formula_less_a_part_of_the_lowest_trained_block(delta):
    formula = costs.flops_per_token(TINY, delta)["training"]
    _, both = measured_flops(delta)
    assert formula - costs.flops_per_token(TINY, Full())["training"] / 3 <= both <= formula


def test_training_a_delta_saves_a_third_of_the_flops_and_the_last_quarter_half():
    config = costs.size("gpt2-medium")
    full = costs.flops_per_token(config, Full())["training"]
    assert 0.666 < costs.flops_per_token(config, LoRA(rank=4))["training"] / full < 0.68
    assert costs.flops_per_token(config, LastLayer(k=6))["training"] / full == 0.5


def test_lora_costs_nothing_once_merged_and_a_prompt_is_read_by_every_layer():
    config = costs.size("gpt2")
    base = costs.flops_per_token(config, Full())["forward"]
    assert costs.flops_per_token(config, LoRA(rank=8))["forward"] == base
    assert costs.flops_per_token(config, Prompt(length=50), text=200)["forward"] == 1.25 * base
    assert costs.flops_per_token(config, Prefix(length=10))["forward"] == base + 2 * 184_320
    assert costs.flops_per_token(config, Adapter(64))["forward"] / base - 1 == pytest.approx(64 / (3 * 768))


def test_a_dense_projection_is_out_of_reach_where_fastfood_is_not():
    dense, fastfood = costs.projection(330_000_000, 1000).values()
    assert dense == (1_320_000_000_000, 660_000_000_000)      # 1.3 TB
    assert fastfood == (7 * 330_000_000, 2 * 330_000_000 * 10)  # 2.3 GB, 100 times fewer operations


def test_intrinsic_is_small_on_disk_and_larger_than_full_fine_tuning_in_memory():
    row = costs.row("gpt2", Intrinsic(dim=1000))
    D = 124_439_808
    assert row["stored_fp32"] == 4000
    blocks = -(-D // 1024)
    assert row["memory_fp32"] == 4 * (D + 1000) + 12 * 1000 + 2 * 4 * D + 7 * 1024 * blocks


def test_a_prefix_is_trained_with_its_mlp_and_stored_without():
    row = costs.row("gpt2", Prefix(length=10, hidden=512))
    assert row["stored"] == row["stored_formula"] == 2 * 12 * 10 * 768
    assert row["trained"] == row["formula"] == 10 * 768 + 768 * 512 + 512 + 2 * 12 * 768 * 513


def test_an_unknown_model_or_field_is_named_with_what_would_be_right():
    with pytest.raises(ValueError, match="'gpt5': choose from gpt2"):
        costs.size("gpt5")
    with pytest.raises(ValueError, match="--set rnk=8: write FIELD=VALUE, the field one of .*rank"):
        costs.changes(["rnk=8"])


def test_the_command_prints_and_writes_what_was_asked_for(tmp_path, capsys):
    costs.main(["--model", "gpt2", "--method", "full", "lora", "--set", "rank=8", "--card", "2", "--csv",
                str(tmp_path / "costs.csv")])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 110
    assert "124,439,808 parameters" in printed and "agrees" in printed and "DIFFERS" not in printed
    full, lora = csv.DictReader(open(tmp_path / "costs.csv", encoding="utf-8"))
    assert lora["trained"] == lora["formula"] == "294912" and lora["settings"] == ""
    assert int(full["memory_fp32"]) == 16 * 124_439_808
    line = [line for line in printed.splitlines() if line.startswith("lora")][1]
    assert line.split()[-1] == "three" or line.endswith("all three")  # 0.5 GB fits on 2


def test_every_method_has_a_setting_at_real_size():
    for name, kind in methods().items():
        row = costs.row("gpt2", costs.chosen(kind, {}))
        assert row["method"] == name and row["trained"] == row["formula"] and row["stored"] == row["stored_formula"]
        assert row["settings"] == " ".join(f"{field}={n}" for field, n in costs.PAPERS.get(name, {}).items())
    assert costs.chosen(LoRA, {}).rank == 4                                   # Hu et al.; our default is 8
    assert costs.chosen(LoRA, {"rank": 16}).rank == 16
