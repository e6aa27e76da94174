"""The numbers that papers and libraries print, next to ours: `eval.py costs --check`.

    printed 37.7M = trunc or round of 37,748,736 / 10⁶ to one decimal: reproduced to the printed digits

A verdict is computed from the printed text and our number, never written down (function `verdict`). Ours
is count() of the real code on the meta device wherever our model or method is the paper's; where it is not
(T5, grouped queries, one adapter a block, vectors per layer) it is the formula given beside it. A setting
marked "fits" is not stated by the paper: we chose the width that gives the printed number.
"""

from collections import Counter
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from fractions import Fraction

from lab.sizes import T5, counted, size, t5_size
from methods.adapter import Adapter
from methods.bitfit import BitFit
from methods.full import Full, block_size
from methods.last_layer import LastLayer
from methods.lora import LoRA
from methods.prefix import Prefix
from methods.prompt import Prompt


@dataclass
class Row:
    """One printed number: `ours` is an int, a Fraction (a percentage, a ratio) or bytes."""

    source: str
    what: str
    printed: str        # exactly as printed, such as "37.7M", "20,480", "0.08%"
    ours: int | Fraction
    setting: str        # the configuration that gives our number
    why: str = ""       # a note; where the two differ, the reason
    cut: bool = True    # may digits have been cut off? False where the same column is plainly rounded

    @property
    def verdict(self):
        return verdict(self.printed, self.ours, self.cut)

    @property
    def equal(self):
        return not self.verdict.startswith("off")

    @property
    def fitted(self):
        return self.setting.startswith("fits")


UNITS = {"": 1, "%": 1, "x": 1, "k": 10**3, "K": 10**3, "M": 10**6, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def verdict(printed, ours, cut=True):
    """exact | rounded | truncated (unless `cut` is False) | to N digits | off by x %.

    "To N digits": a printed whole number such as 250K, whose closing zeros hold places only.
    """
    digits = printed.rstrip("%xkKMBGT")
    value, unit = Decimal(digits.replace(",", "")), UNITS[printed[len(digits):]]
    ours = Fraction(ours) / unit
    found = Decimal(ours.numerator) / Decimal(ours.denominator)
    if found == value:
        return "exact"
    last = Decimal(1).scaleb(value.as_tuple().exponent)              # 37.7 -> 0.1, 250 -> 1
    if found.quantize(last, ROUND_HALF_UP) == value:
        return "rounded"
    if cut and found.quantize(last, ROUND_DOWN) == value:
        return "truncated"
    short = value.normalize().as_tuple()                             # 250 -> digits (2, 5), exponent 1
    place = Decimal(1).scaleb(short.exponent)
    if short.exponent > 0 and unit > 1 and found.quantize(place, ROUND_HALF_UP) == value:
        return f"to {len(short.digits)} digit" + "s" * (len(short.digits) > 1)
    return f"off {100 * (found / value - 1):+.2g} %"


def n(model, delta):
    """How many parameters `delta` stores on `model`, counted on the real code."""
    return counted(model, delta).delta


def percent(part, whole):
    return Fraction(100 * part, whole)


# ---- the sources ----

def base_sizes():
    def row(source, what, printed, model, why=""):
        return Row(source, what, printed, n(model, Full()), model, why)

    whole = "124.6 and 355.4: the paper's figure is a whole number of millions, written with a decimal"
    typo = "0.03 % off, probably a slip for 354.82"
    untied = n("gpt3-175b", Full()) + 50257 * 12288
    return [
        row("BERT, Devlin et al.", "BERT-base", "110M", "bert-base-uncased"),
        row("BERT, Devlin et al.", "BERT-large", "340M", "bert-large-uncased"),
        row("Houlsby et al.", "BERT-large", "330M", "bert-large-cased"),
        row("LoRA table 2", "RoBERTa-base", "125.0M", "roberta-base", whole),
        row("LoRA table 2", "RoBERTa-large", "355.0M", "roberta-large", whole),
        row("LoRA table 3", "GPT-2 medium", "354.92M", "gpt2-medium", typo),
        row("LoRA table 3", "GPT-2 large", "774.03M", "gpt2-large"),
        Row("LoRA tables 4, 15", "GPT-3 175B", "175,255.8M", untied, "gpt3-175b, untied head",
            "not explained; with a tied head it is 174,604,259,328"),
    ]


def adapters_one_a_block(model, m, norms):
    """Adapters behind the mlp only, 2 m d + m + d each, with or without a LayerNorm of their own."""
    d, L = size(model).d_model, size(model).n_layer
    return L * (2 * m * d + m + d + 2 * d * norms)


def lora_table_2():
    source, base, large = "LoRA table 2", "roberta-base", "roberta-large"
    per_block, houlsby = adapters_one_a_block, lambda m: n(large, Adapter(m, norms=False))
    binary = "no m fits: 3.0 and 6.0 x 2^20 are the matrices alone (m=64), without biases"
    return [
        Row(source, "RoBERTa-base LoRA", "0.3M", n(base, LoRA(rank=8)), "query, value, r=8"),
        Row(source, "RoBERTa-large LoRA", "0.8M", n(large, LoRA(rank=8)), "query, value, r=8"),
        Row(source, "DeBERTa-XXL LoRA", "4.7M", 4 * 48 * 1536 * 16, "4 L d r, L=48 d=1536 r=16",
            "the paper's table 10 says r=8, its scripts r=16"),
        Row(source, "RoBERTa-base BitFit", "0.1M", n(base, BitFit()), "all biases"),
        Row(source, "RoBERTa-base AdapterD", "0.9M", per_block(base, 48, 0), "fits: m=48, 12 blocks"),
        Row(source, "RoBERTa-base AdapterD", "0.3M", per_block(base, 48, 0) // 3, "fits: m=48, 4 blocks"),
        Row(source, "RoBERTa-large AdapterP", "3.0M", per_block(large, 64, 0), "m=64, one a block", binary),
        Row(source, "RoBERTa-large AdapterP", "0.8M", per_block(large, 16, 0), "fits: m=16, one a block"),
        Row(source, "RoBERTa-large AdapterH", "6.0M", houlsby(64), "m=64, no norms", binary),
        Row(source, "RoBERTa-large AdapterH", "0.8M", houlsby(8), "fits: m=8, no norms"),
    ]


def lora_table_3():
    source, medium, large = "LoRA table 3", "gpt2-medium", "gpt2-large"
    per_block = adapters_one_a_block
    budget = "r=4 gives {}; the printed number is 0.1 % of the base, a budget for all rows"
    lora = LoRA(rank=4)
    return [
        Row(source, "GPT-2 M AdapterL", "0.37M", per_block(medium, 6, 1), "fits: m=6, 1/block, norm"),
        Row(source, "GPT-2 M AdapterL", "11.09M", per_block(medium, 224, 1), "fits: m=224, 1/block, norm"),
        Row(source, "GPT-2 L AdapterL", "0.88M", per_block(large, 8, 1), "fits: m=8, 1/block, norm"),
        Row(source, "GPT-2 L AdapterL", "23.00M", per_block(large, 248, 1), "fits: m=248, 1/block, norm"),
        Row(source, "GPT-2 M AdapterH", "11.09M", n(medium, Adapter(112, norms=False)), "m=112, no norms",
            "no whole m gives it; printed is AdapterL's number"),
        Row(source, "GPT-2 M FT-top2", "25.19M", n(medium, LastLayer(2)), "2 blocks"),
        Row(source, "GPT-2 M LoRA", "0.35M", n(medium, lora), "query, value, r=4", budget.format("0.39M")),
        Row(source, "GPT-2 L LoRA", "0.77M", n(large, lora), "query, value, r=4", budget.format("0.74M")),
    ]


def lora_gpt3():
    source, gpt3 = "LoRA tables 4, 15", "gpt3-175b"
    qkvo = "query,key,value,out"

    def lora(printed, rank, targets, why=""):
        ours = n(gpt3, LoRA(rank=rank, targets=targets))
        return Row(source, "GPT-3 LoRA", printed, ours, f"{targets} r={rank}", why)

    return [
        lora("4.7M", 2, "value"), lora("4.7M", 1, "query,value"), lora("9.4M", 2, "query,value"),
        lora("9.4M", 1, qkvo), lora("18.8M", 4, "query,value"), lora("18.8M", 2, qkvo),
        lora("37.7M", 8, "query,value"), lora("37.7M", 4, qkvo), lora("301.9M", 64, "query,value"),
        lora("603.8M", 64, qkvo, "0.03 % off: twice the truncated 301.9"),
        *(Row(source, "GPT-3 AdapterH", printed, n(gpt3, Adapter(m, norms=False)), f"m={m}, no norms")
          for m, printed in ((1, "7.1M"), (4, "21.2M"), (8, "40.1M"), (16, "77.9M"), (64, "304.4M"))),
        *(Row(source, "GPT-3 PreEmbed", printed, n(gpt3, Prompt(length=P)), f"{P} vectors",
              "printed is what 32 vectors make, without the 8" if P == 40 else "", cut=False)
          for P, printed in ((40, "0.4M"), (72, "0.9M"), (136, "1.7M"), (264, "3.2M"), (520, "6.4M"))),
        *(Row(source, "GPT-3 PreLayer", printed, 96 * 12288 * P, f"L d {P}: a vector a layer",
              "not explained: 1 to 8 % more than the paper's own formula L d (l_p + l_i)")
          for P, printed in ((4, "5.1M"), (8, "10.1M"), (16, "20.2M"), (36, "44.1M"), (64, "76.1M"))),
        Row(source, "GPT-3 BitFit", "14.2M", n(gpt3, BitFit()), "all biases, 11 L d + d",
            "the printed number is 12 L d; a block has 11 d biases"),
    ]


def prefixes():
    def row(source, what, printed, P):
        return Row(source, what, printed, n("gpt2-medium", Prefix(length=P)), f"GPT-2 M, P={P}")

    return [row("Li & Liang 2021", "prefix, E2E and WebNLG", "250K", 5),
            row("Li & Liang 2021", "prefix, DART", "500K", 10),
            row("peft documentation", "prefix, 24 layers of 1024", "983,040", 20)]


# T5 and a prompt of 100 tokens together: one row a size fixes T5 and P d; the other 81 are multiplications.
LESTER = {"small": "77,012,352", "base": "247,654,656", "large": "783,252,480", "xl": "2,849,961,984",
          "xxl": "11,135,741,952"}


def lester():
    source = "Lester et al. table 4"

    def slip(what, printed, ours, why):
        return Row(source, f"T5 {what}", printed, ours, "P d, all but these 4 agree", f"a slip: {why}")

    def total(name, P):
        return t5_size(name) + P * T5[name][0]

    return [
        *(Row(source, f"T5 {name} and prompt, P=100", printed, total(name, 100), f"P d, d={T5[name][0]}")
          for name, printed in LESTER.items()),
        slip("small, P=20: the prompt", "10,420", 20 * 512, "the percentage beside it was computed from 20 x 512"),
        slip("small, P=20: both", "76,971,572", total("small", 20), "that of 10,420, added"),
        slip("large, P=100: prompt in %", "0.01907%", percent(100 * 1024, total("large", 100)), "0.01307 is meant"),
        slip("xxl, P=50: both", "11,137,380,352", total("xxl", 50), "the base plus 204,800 is 11,135,537,152"),
    ]


def bitfit():
    rows = []
    for name, printed in (("base", "0.09%"), ("large", "0.08%")):
        model, source = f"bert-{name}-cased", "BitFit, Ben Zaken et al."
        D = n(model, Full())
        rows += [Row(source, f"BERT-{name}", printed, percent(n(model, BitFit()), D), model),
                 Row(source, f"BERT-{name}, query and up", "0.04%",
                     percent(n(model, BitFit(only="query_up")), D), "L (d + f)")]
    return rows


def houlsby():
    source, base, large = "Houlsby et al.", "bert-base-cased", "bert-large-uncased"
    D, head = n(large, Full()), 2 * 1024 + 2
    blocks = size(large).n_layer * block_size(size(large))
    tuned, norms = n(base, Adapter(64)), n(base, Adapter(64)) - n(base, Adapter(64, norms=False))
    return [
        Row(source, "BERT-large, the smallest share", "0.5%", percent(n(large, Adapter(16)) + head, D),
            "m=16, norms, head of 2"),
        Row(source, "BERT-large, the largest share", "8%", percent(n(large, Adapter(256)) + head, D),
            "m=256, norms, head of 2"),
        Row(source, "BERT-large, m=64", "2.1%", percent(n(large, Adapter(64, norms=False)), blocks),
            "of the blocks, no norms", "of all weights it is 1.9 %"),
        Row(source, "BERT-base, m=64", "2M", tuned, "m=64, norms"),
        Row(source, "BERT-base, m=2", "0.1%", percent(n(base, Adapter(2)), n(base, Full())), "m=2, norms"),
        Row(source, "BERT-base, LayerNorms alone", "40k", norms, "2 d (2 L + 1)"),
        Row(source, "BERT-base, top layer", "9M", n(base, LastLayer(1)), "1 block",
            "7.7M with the pooler; what else the paper counts it does not say"),
    ]


def peft_llama():
    """peft's own comparison on Llama-3.2-3B: 28 blocks, width 3072, 8 key heads of 128 (grouped queries)."""
    L, d, kv, source = 28, 3072, 1024, "peft on Llama-3.2-3B"
    return [
        Row(source, "LoRA", "9,175,040", L * 32 * ((d + d) + (d + kv)), "query, value, r=32"),
        Row(source, "prefix", "11,468,800", 2 * L * 200 * kv, "P=200, 2 L P 1024"),
        Row(source, "prefix", "2,867,200", 2 * L * 50 * kv, "P=50, 2 L P 1024"),
        Row(source, "prompt", "614,400", 200 * d, "P=200"),
        Row(source, "bias of the value projection", "28,672", L * kv, "L 1024"),
        Row(source, "norms", "175,104", (2 * L + 1) * d, "(2 L + 1) d"),
    ]


def storage():
    gpt3, source = "gpt3-175b", "LoRA section 4.2"
    D, T = n(gpt3, Full()), n(gpt3, LoRA(rank=4))
    return [
        Row(source, "GPT-3 checkpoint", "350GB", 2 * D, "2 bytes a weight"),
        Row("Ding et al.", "GPT-3 checkpoint", "700GB", 4 * D, "4 bytes a weight"),
        Row(source, "GPT-3 LoRA checkpoint", "35MB", 2 * T, "query, value, r=4, 2 bytes",
            "36.0 where a megabyte is 2^20 bytes; the paper rounds further"),
        Row(source, "checkpoint, times smaller", "10,000x", Fraction(D, T), "D / (4 L d r), r=4",
            "the paper says roughly: 9,251 times"),
        Row(source, "GPT-3 LoRA training memory", "350GB", 2 * D, "16-bit weights alone",
            "LoRA's own weights, gradients and moments add 0.3 GB; activations are not counted"),
        Row(source, "GPT-3 training memory", "1.2TB", 6 * D, "16-bit weights and moments",
            "no plain memory model gives it: 1.05, with gradients 1.40, mixed precision 2.79"),
    ]


def rows():
    return [*base_sizes(), *lora_table_2(), *lora_table_3(), *lora_gpt3(), *storage(), *houlsby(), *bitfit(),
            *prefixes(), *peft_llama(), *lester()]


# ---- the table ----

def number(ours):
    """An int with commas, a ratio with five digits behind the point."""
    return f"{ours:,}" if isinstance(ours, int) else f"{float(ours):,.5f}"


def table(rows):
    lines = [f"{'':<32}{'printed':>15}{'ours':>18}  {'setting':<27}verdict"]
    for source in dict.fromkeys(r.source for r in rows):
        lines += ["", source]
        said = ""
        for r in (r for r in rows if r.source == source):
            lines.append(f"  {r.what:<30}{r.printed:>15}{number(r.ours):>18}  {r.setting:<27}{r.verdict}")
            if r.why and r.why != said:
                lines.append(f"      {r.why}")
            said = r.why
    return lines + ["", "", *summary(rows)]


def summary(rows):
    """How many are equal, source by source, and how."""
    equal = [r for r in rows if r.equal]
    kinds = Counter(r.verdict for r in equal)
    loose = sum(number for kind, number in kinds.items() if kind.startswith("to "))
    return [f"{len(equal)} of {len(rows)} printed numbers are reproduced to the printed digits:",
            "  " + ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items())),
            f"  in {loose} closing zeros are no digits; in {sum(r.fitted for r in equal)} a width was chosen to fit",
            f"{len(rows) - len(equal)} differ; the line below each, or below the first of several, says why."]


def plain(rows):
    """The rows as dictionaries, for CSV."""
    return [{"source": r.source, "what": r.what, "printed": r.printed,
             "ours": r.ours if isinstance(r.ours, int) else float(r.ours),
             "setting": r.setting, "verdict": r.verdict, "why": r.why} for r in rows]
