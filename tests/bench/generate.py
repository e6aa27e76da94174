"""Words a second: model.generate beside transformers' generate, and 100,000 texts through WordPiece.

    python tests/bench/generate.py
    python tests/bench/generate.py --base FOLDER --data FOLDER     and texts like those, for a BERT

Both sides decode greedily with a cache, without gradients, in float32: 64 new tokens behind a prompt of 32, one text
at a time and sixteen. Each model has random weights, which transformers writes and data/checkpoints.py reads, so that
both must say the same. Theirs is taken at its best: of its two ways to attention, SDPA and eager, the faster counts.
The texts are those of the data folder's dev file, each time with their words in another order: hardly two are equal.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from harness import boundary

if __name__ == "__main__":
    boundary.begin()  # before torch is imported

import random
import tempfile
import time
from functools import partial
from itertools import cycle, islice

import torch

from data import checkpoints, own
from data.bases import SHAPES
from data.tasks import Encoder
from harness import report
from harness.settings import Parser, distinct, positive
from lab.sizes import SIZES, size
from lab.timing import side_by_side
from model import Refused, Transformer, generate

PROMPT, NEW, TEXTS = 32, 64, 100_000


def pair(shape):
    """(our model, {attention: theirs}), with the same random weights."""
    try:
        import transformers
    except ImportError:
        raise Refused("transformers is not installed: pip install transformers") from None
    transformers.utils.logging.disable_progress_bar()
    config = transformers.GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.n_ctx, n_embd=shape.d_model, n_layer=shape.n_layer,
        n_head=shape.n_head, n_inner=shape.d_ff, bos_token_id=0, eos_token_id=None, pad_token_id=0,
        initializer_range=shape.d_model ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        config, state = checkpoints.read(folder)
        theirs = {attention: transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation=attention).eval()
                  for attention in ("sdpa", "eager")}
    mine = Transformer(config)
    mine.load_state_dict(state)
    return mine.eval(), theirs


def decoding(mine, theirs, batch, rounds):
    """{side: tokens a second}, with the share of tokens on which the sides agree."""
    ids = torch.randint(1, mine.config.vocab_size, (batch, PROMPT))
    written = {}

    def by_ours():
        written["ours"] = generate(mine, ids, steps=NEW)

    def by(name):
        written[name] = theirs[name].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
                                              do_sample=False, use_cache=True)[:, PROMPT:]
    sides = {"ours": by_ours} | {name: partial(by, name) for name in theirs}
    ms, _ = side_by_side(sides, rounds)
    agree = min((written["ours"] == told).float().mean().item() for told in written.values())
    return {name: 1000 * batch * NEW / ms[name] for name in sides} | {"agree": agree}


def texts(data):
    """TEXTS texts of a data folder's dev file, each with its words in an order of its own."""
    rng, sources = random.Random(0), [text.split() for text, _ in own.read(data).splits["dev"]]
    return [" ".join(rng.sample(words, len(words))) for words in islice(cycle(sources), TEXTS)]


def encoding(base, data):
    """{how: seconds}: the tokenizer alone, and examples as train.py makes them."""
    tokenizer, found, many = checkpoints.tokenizer(base), {}, texts(data)
    config, _ = checkpoints.read(base)
    encoder = Encoder(tokenizer, config)
    for name, one in ("ids", tokenizer.encode), ("examples", lambda text: encoder.classified(text, ["0"], 0)):
        begin = time.perf_counter()
        for text in many:
            one(text)
        found[name] = time.perf_counter() - begin
    return found


def main():
    parser = Parser("generate.py", __doc__)
    parser.add_argument("--sizes", default="gpt-s,gpt2", help="with commas between [gpt-s,gpt2]")
    parser.add_argument("--rounds", type=positive, default=7, help="turns, after one to warm up [7]")
    parser.add_argument("--base", metavar="FOLDER", help="a BERT's checkpoint, whose WordPiece is timed")
    parser.add_argument("--data", metavar="FOLDER", help="as for train.py")
    args = parser.parse_args()
    print(report.machine())
    print(f"{'tokens a second':<18}{'ours':>9}{'sdpa':>9}{'eager':>9}{'ratio':>9}{'agree':>9}")
    for name in distinct("--sizes", args.sizes.split(","), [*SHAPES, *SIZES]):
        torch.manual_seed(0)
        models = pair(SHAPES[name] if name in SHAPES else size(name))
        for batch in 1, 16:
            found = decoding(*models, batch, args.rounds)
            print(f"{name:<8}batch {batch:<4}" + "".join(f"{found[side]:>9.0f}" for side in ("ours", "sdpa", "eager"))
                  + f"{found['ours'] / max(found['sdpa'], found['eager']):>9.2f}{found['agree']:>9.0%}", flush=True)
    if args.base and args.data:
        found = encoding(args.base, args.data)
        print(f"{TEXTS:,} texts: {found['ids']:.1f} s as ids, {found['examples']:.1f} s as examples")


if __name__ == "__main__":
    boundary.run(main)
