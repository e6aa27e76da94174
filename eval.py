"""Asks what training was worth.

    python eval.py score out/lora-gpt-s-rating-....pt    score a saved delta, show what it answers
    python eval.py compare                                all techniques against full fine-tuning, in one table
    python eval.py d90                                    the smallest subspace that reaches 90 % of full fine-tuning
    python eval.py rates                                  is each default learning rate a good one elsewhere too?
    python eval.py prompts                                prompting without training: written by hand, then searched
    python eval.py lowdata                                score against the number of training examples
    python eval.py costs                                  parameters, memory, FLOPs and storage, up to GPT-3 175B
    python eval.py export out/lora-....pt -o DIR          a delta for PEFT, or with --merge a model for transformers
    python eval.py import DIR --base FOLDER -o FILE       a LoRA that PEFT has saved becomes a delta file
    python eval.py claims                                 the survey's 44 claims and four more, each with its number

Each has a --help of its own and a room of its own in lab/, the claims in survey/.
"""

import sys
from importlib import import_module

from harness import boundary

DOORS = {name: f"lab.{name}" for name in ("score", "compare", "d90", "prompts", "lowdata", "costs", "rates")} | {
    "export": "lab.export", "import": "lab.peft", "claims": "survey.claims"}


def main():
    argv = sys.argv[1:]
    if not argv or argv[0] in ("-h", "--help"):
        return print(__doc__)
    if argv[0] not in DOORS:
        boundary.say(f"{argv[0]!r} is none of {', '.join(DOORS)}", 2)
        raise SystemExit(2)
    room = import_module(DOORS[argv[0]])  # by name, so that a door costs nothing until it is opened
    boundary.run(lambda: room.main(argv[1:]))


if __name__ == "__main__":
    boundary.begin()
    main()
