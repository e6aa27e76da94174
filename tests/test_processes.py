"""Two processes on one run, started by torchrun: they do what one would do, and one's death is the end of both."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import together
import train
from data import files, tasks
from deltas import methods, read
from harness import processes, report, results, state
from harness.settings import Settings
from model import Refused

HERE = Path(__file__).parent
CHOICE = {"base": "gpt-xs", "steps": 4, "examples": 10, "batch_size": 5, "device": "cpu"}
TYPED = [word for name, value in CHOICE.items() for word in (f"--{name}", str(value))]


def loopback():
    """Can two processes on this machine talk to each other? In an empty network namespace they cannot."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as here, socket.create_connection(here.getsockname(), timeout=2):
            return True
    except OSError:
        return False


def torchrun(mode, folder, *options, **environment):
    """Two processes of together.py: what is left of them."""
    if not loopback():
        pytest.skip("no loopback interface: processes could not talk to each other")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run([*command, HERE / "together.py", mode, folder, *options], capture_output=True, text=True,
                          timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(what was printed, folder) of two processes that have trained LoRA and full fine-tuning, then all techniques."""
    folder = tmp_path_factory.mktemp("pair")
    done = torchrun("compare", folder, "--method", "lora", *TYPED, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_two_processes_have_the_losses_gradients_and_scores_of_one_for_every_technique(pair):
    """Batches of three, three and one text: two and one for the processes, or one and none. float32 has the loss."""
    (_, first, _), (_, second, _) = (torch.load(pair[1] / f"{rank}.pt") for rank in (0, 1))
    unused = set()
    for (case, model, classes), mine, other in zip(together.models(), first, second, strict=True):
        curve, steps = together.trained(model, classes)
        dev, both = ([score for _, score in points] for points in (curve, mine[0]))
        assert mine[0] == other[0] and both == pytest.approx(dev, abs=1e-4), f"{case}: dev is shared out and collected"
        for step, (one, two, alone) in enumerate(zip(mine[1], other[1], steps, strict=True), 1):
            assert one[0] == two[0] == pytest.approx(alone[0], abs=2e-6), f"{case}, step {step}: the loss of the batch"
            for name, gradient in alone[1].items():
                where = f"{case}, step {step}, {name}"
                if gradient is None:
                    assert one[1][name] is two[1][name] is None, f"{where}: what nobody uses has no gradient"
                    unused.add(name)
                    continue
                assert torch.equal(one[1][name], two[1][name]), f"{where}: one and the same in both processes"
                assert (one[1][name] - gradient).abs().max() < 1e-6, f"{where}: the gradient of the batch"
    assert unused == {"pooler.dense.bias"}


def test_what_is_shared_out_comes_back_in_order_to_all(pair):
    """Four of seven numbers are doubled by one process, three by the other."""
    for rank in (0, 1):
        assert torch.load(pair[1] / f"{rank}.pt")[2] == [0, 2, 4, 6, 8, 10, 12]


def test_all_go_on_from_the_first_ones_delta_and_its_base_or_not_at_all(pair, monkeypatch):
    """The second process has drawn another one."""
    (first, *_), (second, *_) = (torch.load(pair[1] / f"{rank}.pt") for rank in (0, 1))
    drawn, other = together.begun(0), together.begun(1)
    for name, tensor in drawn.items():
        assert torch.equal(first[name], tensor) and torch.equal(second[name], tensor), name
    assert {name for name in drawn if not torch.equal(drawn[name], other[name])} == {"project.places"} | {
        name for name in drawn if name.endswith(".A")}, "else the lines above would prove nothing"
    for name, is_now in (("number", 2), ("rank", 1), ("from_first", "another base")):
        monkeypatch.setattr(processes, name, lambda *_, is_now=is_now: is_now)
    with pytest.raises(Refused, match="process 1: its base is not the one that the first process has"):
        together.begun(1)


def test_the_first_process_prints_and_writes_what_one_would(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "SIZES", together.SIZES)
    said, folder = pair
    assert said.count("\ncheck      step 0") == said.count("\nstep      4/4") == 2, "a line a run, by one process"
    assert "\nprocesses  2, each with its part of every batch; 0.01 MB of gradients travel a step\n" in said
    assert sorted(path.suffix for path in (folder / "out").iterdir()) == [".jsonl", ".pt", ".pt"]
    lora, full, again = results.read(folder / "out")
    assert again["full_score"] == full["score"] and again["score"] == lora["score"]
    for record in (lora, full):
        made = Settings(methods()[record["method"]](), **CHOICE)
        alone = train.run(made, tmp_path, report.quiet)
        assert (record["processes"], alone["processes"]) == (2, 1), "it is in the record"
        assert record["file"] == alone["file"] and record["settings"] == alone["settings"], "and not in the key"
        alone["curve"] = [list(point) for point in alone["curve"]]
        for name in ("frozen_score", "score", "dev_score", "curve", "stored_bytes", "metric", "delta_params"):
            assert record[name] == alone[name], f"{made.delta}: {name}"
        assert record["memory_mb"]["activations"] < alone["memory_mb"]["activations"], "of a process, with its part"
        one, two = (read(out / record["file"])["tensors"] for out in (tmp_path, folder / "out"))
        for name, tensor in one.items():
            if "key.bias" not in name:  # moved by rounding noise alone
                assert (tensor - two[name]).abs().max() < 2e-4, f"{made.delta}, {name}: the weights that were saved"


@pytest.mark.slow
def test_a_killed_process_ends_all_in_seconds_and_the_next_start_goes_on(tmp_path, monkeypatch):
    """Killed in step 17 of 30: dev was scored at 2, 4, ... 16. The next start is one process, it need not be two."""
    choice = CHOICE | {"steps": 30}
    typed = [word for name, value in choice.items() for word in (f"--{name}", str(value))]
    done = torchrun("kill", tmp_path, "--method", "lora", *typed, "--no_baseline", "--out", tmp_path / "out",
                    DELTA_STATE_AFTER="0")
    assert "another process of this run has ended; the same command goes on from step 16" in done.stderr or (
        "interrupted; the same command goes on from step 16" in done.stderr), done.stderr
    assert done.returncode != 0 and time.time() - float((tmp_path / "killed").read_text(encoding="utf-8")) < 60
    made = Settings(methods()["lora"](), **choice)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [made.file + ".state"], "and no half file"
    assert files.tensors(tmp_path / "out" / (made.file + ".state"))["step"] == 16
    monkeypatch.setattr(tasks, "SIZES", together.SIZES)
    monkeypatch.setattr(state, "AFTER", 0)
    said = []
    train.run(made, tmp_path / "out", said.append)
    assert "going on from step 16, where this run was stopped" in "\n".join(said)


def test_without_torchrun_nothing_is_divided_and_nothing_is_summed():
    """The one process gets the very objects back that it gave."""
    batch, loss, parameter = [torch.ones(3, 2)] * 3, torch.tensor(2.0), torch.nn.Parameter(torch.ones(2))
    processes.begin("cpu")
    assert (processes.number(), processes.rank(), processes.first()) == (1, 0, True)
    assert processes.part(batch)[0] is batch and processes.part(batch)[1] == 1
    assert processes.add_up(loss, 0.5, [parameter]) is loss and parameter.grad is None
    assert processes.mine([1, 2, 3]) == processes.total([1, 2, 3]) == [1, 2, 3]
    assert processes.shared_out(lambda part: part[::-1], "abc") == "cba"
    assert processes.from_first(lambda: "kept") == "kept"
