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


# ---- the sources: (what, printed, ours, setting, why, cut) of each number, see Row ----

def bert():
    return [("BERT-base", "110M", n("bert-base-uncased", Full()), "bert-base-uncased"),
            ("BERT-large", "340M", n("bert-large-uncased", Full()), "bert-large-uncased")]


def houlsby():
    base, large, config = "bert-base-cased", "bert-large-uncased", size("bert-large-uncased")
    D, head, blocks = n(large, Full()), 2 * 1024 + 2, config.n_layer * block_size(config)
    tuned, plain = n(base, Adapter(64)), n(base, Adapter(64, norms=False))
    return [
        ("BERT-large", "330M", n("bert-large-cased", Full()), "bert-large-cased"),
        ("BERT-large, the smallest share", "0.5%", percent(n(large, Adapter(16)) + head, D), "m=16, norms, head of 2"),
        ("BERT-large, the largest share", "8%", percent(n(large, Adapter(256)) + head, D), "m=256, norms, head of 2"),
        ("BERT-large, m=64", "2.1%", percent(n(large, Adapter(64, norms=False)), blocks), "of the blocks, no norms",
         "of all weights it is 1.9 %"),
        ("BERT-base, m=64", "2M", tuned, "m=64, norms"),
        ("BERT-base, m=2", "0.1%", percent(n(base, Adapter(2)), n(base, Full())), "m=2, norms"),
        ("BERT-base, LayerNorms alone", "40k", tuned - plain, "2 d (2 L + 1)"),
        ("BERT-base, top layer", "9M", n(base, LastLayer(1)), "1 block",
         "7.7M with the pooler; what else the paper counts it does not say"),
    ]


def adapters_one_a_block(model, m, norms):
    """Adapters behind the mlp only, 2 m d + m + d each, with or without a LayerNorm of their own."""
    d, L = size(model).d_model, size(model).n_layer
    return L * (2 * m * d + m + d + 2 * d * norms)


def lora_table_2():
    base, large, per_block = "roberta-base", "roberta-large", adapters_one_a_block
    whole = "124.6 and 355.4: the paper's figure is a whole number of millions, written with a decimal"
    binary = "no m fits: 3.0 and 6.0 x 2^20 are the matrices alone (m=64), without biases"
    return [
        ("RoBERTa-base", "125.0M", n(base, Full()), base, whole),
        ("RoBERTa-large", "355.0M", n(large, Full()), large, whole),
        ("RoBERTa-base LoRA", "0.3M", n(base, LoRA(rank=8)), "query, value, r=8"),
        ("RoBERTa-large LoRA", "0.8M", n(large, LoRA(rank=8)), "query, value, r=8"),
        ("DeBERTa-XXL LoRA", "4.7M", 4 * 48 * 1536 * 16, "4 L d r, L=48 d=1536 r=16",
         "the paper's table 10 says r=8, its scripts r=16"),
        ("RoBERTa-base BitFit", "0.1M", n(base, BitFit()), "all biases"),
        ("RoBERTa-base AdapterD", "0.9M", per_block(base, 48, 0), "fits: m=48, 12 blocks"),
        ("RoBERTa-base AdapterD", "0.3M", per_block(base, 48, 0) // 3, "fits: m=48, 4 blocks"),
        ("RoBERTa-large AdapterP", "3.0M", per_block(large, 64, 0), "m=64, one a block", binary),
        ("RoBERTa-large AdapterP", "0.8M", per_block(large, 16, 0), "fits: m=16, one a block"),
        ("RoBERTa-large AdapterH", "6.0M", n(large, Adapter(64, norms=False)), "m=64, no norms", binary),
        ("RoBERTa-large AdapterH", "0.8M", n(large, Adapter(8, norms=False)), "fits: m=8, no norms"),
    ]


def lora_table_3():
    medium, large, per_block = "gpt2-medium", "gpt2-large", adapters_one_a_block
    budget = "r=4 gives {}; the printed number is 0.1 % of the base, a budget for all rows"
    return [
        ("GPT-2 medium", "354.92M", n(medium, Full()), medium, "0.03 % off, probably a slip for 354.82"),
        ("GPT-2 large", "774.03M", n(large, Full()), large),
        ("GPT-2 M AdapterL", "0.37M", per_block(medium, 6, 1), "fits: m=6, 1/block, norm"),
        ("GPT-2 M AdapterL", "11.09M", per_block(medium, 224, 1), "fits: m=224, 1/block, norm"),
        ("GPT-2 L AdapterL", "0.88M", per_block(large, 8, 1), "fits: m=8, 1/block, norm"),
        ("GPT-2 L AdapterL", "23.00M", per_block(large, 248, 1), "fits: m=248, 1/block, norm"),
        ("GPT-2 M AdapterH", "11.09M", n(medium, Adapter(112, norms=False)), "m=112, no norms",
         "no whole m gives it; printed is AdapterL's number"),
        ("GPT-2 M FT-top2", "25.19M", n(medium, LastLayer(2)), "2 blocks"),
        ("GPT-2 M LoRA", "0.35M", n(medium, LoRA(rank=4)), "query, value, r=4", budget.format("0.39M")),
        ("GPT-2 L LoRA", "0.77M", n(large, LoRA(rank=4)), "query, value, r=4", budget.format("0.74M")),
    ]


def lora_gpt3():
    gpt3, two, four = "gpt3-175b", "query,value", "query,key,value,out"
    loras = (("4.7M", 2, "value"), ("4.7M", 1, two), ("9.4M", 2, two), ("9.4M", 1, four), ("18.8M", 4, two),
             ("18.8M", 2, four), ("37.7M", 8, two), ("37.7M", 4, four), ("301.9M", 64, two), ("603.8M", 64, four))
    return [
        ("GPT-3 175B", "175,255.8M", n(gpt3, Full()) + 50257 * 12288, "gpt3-175b, untied head",
         "not explained; with a tied head it is 174,604,259,328"),
        *(("GPT-3 LoRA", printed, n(gpt3, LoRA(rank=r, targets=targets)), f"{targets} r={r}",
           "0.03 % off: twice the truncated 301.9" if printed == "603.8M" else "") for printed, r, targets in loras),
        *(("GPT-3 AdapterH", printed, n(gpt3, Adapter(m, norms=False)), f"m={m}, no norms")
          for m, printed in ((1, "7.1M"), (4, "21.2M"), (8, "40.1M"), (16, "77.9M"), (64, "304.4M"))),
        *(("GPT-3 PreEmbed", printed, n(gpt3, Prompt(length=P)), f"{P} vectors",
           "printed is what 32 vectors make, without the 8" if P == 40 else "", False)
          for P, printed in ((40, "0.4M"), (72, "0.9M"), (136, "1.7M"), (264, "3.2M"), (520, "6.4M"))),
        *(("GPT-3 PreLayer", printed, 96 * 12288 * P, f"L d {P}: a vector a layer",
           "not explained: 1 to 8 % more than the paper's own formula L d (l_p + l_i)")
          for P, printed in ((4, "5.1M"), (8, "10.1M"), (16, "20.2M"), (36, "44.1M"), (64, "76.1M"))),
        ("GPT-3 BitFit", "14.2M", n(gpt3, BitFit()), "all biases, 11 L d + d",
         "the printed number is 12 L d; a block has 11 d biases"),
    ]


def lora_storage():
    D, T = n("gpt3-175b", Full()), n("gpt3-175b", LoRA(rank=4))
    return [
        ("GPT-3 checkpoint", "350GB", 2 * D, "2 bytes a weight"),
        ("GPT-3 LoRA checkpoint", "35MB", 2 * T, "query, value, r=4, 2 bytes",
         "36.0 where a megabyte is 2^20 bytes; the paper rounds further"),
        ("checkpoint, times smaller", "10,000x", Fraction(D, T), "D / (4 L d r), r=4",
         "the paper says roughly: 9,251 times"),
        ("GPT-3 LoRA training memory", "350GB", 2 * D, "16-bit weights alone",
         "LoRA's own weights, gradients and moments add 0.3 GB; activations are not counted"),
        ("GPT-3 training memory", "1.2TB", 6 * D, "16-bit weights and moments",
         "no plain memory model gives it: 1.05, with gradients 1.40, mixed precision 2.79"),
    ]


def ding():
    return [("GPT-3 checkpoint", "700GB", 4 * n("gpt3-175b", Full()), "4 bytes a weight")]


def bitfit():
    found = []
    for name, printed in (("base", "0.09%"), ("large", "0.08%")):
        model = f"bert-{name}-cased"
        D = n(model, Full())
        found += [(f"BERT-{name}", printed, percent(n(model, BitFit()), D), model),
                  (f"BERT-{name}, query and up", "0.04%", percent(n(model, BitFit("query_up")), D), "L (d + f)")]
    return found


def li_and_liang():
    return [("prefix, E2E and WebNLG", "250K", n("gpt2-medium", Prefix(length=5)), "GPT-2 M, P=5"),
            ("prefix, DART", "500K", n("gpt2-medium", Prefix(length=10)), "GPT-2 M, P=10")]


def peft_documentation():
    return [("prefix, 24 layers of 1024", "983,040", n("gpt2-medium", Prefix(length=20)), "GPT-2 M, P=20")]


def peft_llama():
    """Llama-3.2-3B: 28 blocks, width 3072, 8 key heads of 128 (grouped queries)."""
    L, d, kv = 28, 3072, 1024
    return [
        ("LoRA", "9,175,040", L * 32 * ((d + d) + (d + kv)), "query, value, r=32"),
        ("prefix", "11,468,800", 2 * L * 200 * kv, "P=200, 2 L P 1024"),
        ("prefix", "2,867,200", 2 * L * 50 * kv, "P=50, 2 L P 1024"),
        ("prompt", "614,400", 200 * d, "P=200"),
        ("bias of the value projection", "28,672", L * kv, "L 1024"),
        ("norms", "175,104", (2 * L + 1) * d, "(2 L + 1) d"),
    ]


def lester():
    """Of ninety numbers, P d and its sum with T5 for six P and five sizes, one a size and the four that differ."""
    def both(name, P):
        return t5_size(name) + P * T5[name][0]

    totals = {"small": "77,012,352", "base": "247,654,656", "large": "783,252,480", "xl": "2,849,961,984",
              "xxl": "11,135,741,952"}
    return [
        *((f"T5 {name} and prompt, P=100", printed, both(name, 100), f"P d, d={T5[name][0]}")
          for name, printed in totals.items()),
        ("T5 small, P=20: prompt", "10,420", 20 * 512, "P d, d=512",
         "a slip: 20 x 512 = 10,240, which the percentage beside it was computed from"),
        ("T5 small and prompt, P=20", "76,971,572", both("small", 20), "P d, d=512", "the slip of 10,420, added"),
        ("T5 large, P=100: prompt in %", "0.01907%", percent(100 * 1024, both("large", 100)), "P d, d=1024",
         "a slip: 102,400 of 783,252,480 is 0.01307 %"),
        ("T5 xxl and prompt, P=50", "11,137,380,352", both("xxl", 50), "P d, d=4096",
         "a slip: the base plus 204,800 is 11,135,537,152"),
    ]


SOURCES = {"BERT, Devlin et al.": bert, "Houlsby et al.": houlsby, "LoRA table 2": lora_table_2,
           "LoRA table 3": lora_table_3, "LoRA tables 4, 15": lora_gpt3, "LoRA section 4.2": lora_storage,
           "Ding et al.": ding, "BitFit, Ben Zaken et al.": bitfit, "Li & Liang 2021": li_and_liang,
           "peft documentation": peft_documentation, "peft on Llama-3.2-3B": peft_llama,
           "Lester et al. table 4": lester}


def rows():
    return [Row(source, *found) for source, numbers in SOURCES.items() for found in numbers()]


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
