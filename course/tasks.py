"""The tasks of the course: 20 functions of the core, by file and name. Their bodies are what a student writes.

No line of the core knows of this list, and no function was split for it. A handout has the text below as the
docstring above each hole, and the hint as the message of the NotImplementedError in it. A task is graded by the tests
that have points of its tag (`@pytest.mark.points(3, "lora")`); how many points is said there and nowhere else.

NEEDS has every tag of the course, in the order in which they are best set, and the tags without whose functions its
tests cannot pass. `generate`, `saving` and `train` have no holes: decoding with a cache, files and the loop are taught
by broken copies (`make --bugs`).
"""

from dataclasses import dataclass

LONGEST = 12  # lines of a body

NEEDS = {
    "counts": ("deltas",),
    "deltas": (),
    "last_layer": ("counts", "deltas", "model"),
    "bitfit": ("deltas", "model"),
    "model": (),
    "generate": ("model",),
    "tasks": ("model",),
    "lora": ("deltas", "model"),
    "adapter": ("deltas", "model"),
    "prompt": ("deltas", "model"),
    "prefix": ("deltas", "model"),
    "fastfood": (),
    "intrinsic": ("deltas", "model", "fastfood"),
    "mask": ("deltas", "intrinsic", "model", "tasks"),
    "saving": ("deltas", "model", "bitfit", "lora"),
    "train": ("deltas", "model", "lora", "tasks"),
}


@dataclass(frozen=True)
class Task:
    tag: str
    file: str
    name: str      # of the function, Class.method
    minutes: int
    hint: str
    text: str      # what it does, shapes, equation


TASKS = (
    Task("counts", "methods/full.py", "block_size", 10, "four squares, two rectangles, all their biases, two norms", """
        With d = d_model and f = d_ff: query, key, value and out are d x d, up is f x d, down is d x f, each with a
        bias; two LayerNorms have a gain and a bias each.
        """),
    Task("counts", "methods/full.py", "base_size", 20, "what is outside the blocks depends on the Config", """
        Outside the L blocks: word, position and type embeddings; one norm (the final one of a GPT, the embedding's of
        a BERT); with config.pooler a d x d layer. config.lm_head is "none", "linear" (one matrix V x d, no bias) or
        "mlm" (a d x d layer, a norm, and V biases beside the matrix). If config.tied, that matrix is the word
        embedding itself and is there once.
        """),
    Task("deltas", "deltas.py", "attach", 25, "freeze, let in, free the Classifier, note what the base was", """
        Step by step: a model that carries a delta already is Refused. Note shapes_of(model) and, unless `mark` is
        given, the fingerprint of own_parameters(model) with the model's config, before anything is changed. Inside
        `with as_before_if_refused(model) as before`: freeze everything, then let the delta's own attach have the
        model; what that returns is the model from now on. A Classifier as model.head is trained. The model that is
        returned has the attributes delta, base_fingerprint, base_shapes, base_size, the number of values in all those
        shapes, and before, which is before.keep(restorable).
        """),
    Task("deltas", "deltas.py", "count", 10, "whatever requires a gradient is head or delta", """
        Every trainable(model) parameter belongs to the head if its id is in head_parameters(model), and else to the
        delta. The base's size was noted by attach.
        """),
    Task("last_layer", "methods/last_layer.py", "LastLayer.attach", 10, "the top k of model.blocks, whole", """
        The model comes in frozen. Of L = len(model.blocks) blocks the last k = self.k train with all they have, and
        nothing else does. k > L is Refused: "k=4: this model has 3 blocks, choose 1 to that many". Returns the model.
        """),
    Task("bitfit", "methods/bitfit.py", "BitFit.attach", 15, "a bias is what a Linear or a LayerNorm calls bias", """
        The model comes in frozen. only="all": the bias of every Linear and every LayerNorm trains; some Linears have
        none (None). only="query_up": in every block that of attention.query and of mlp.up, and no other. Values stay
        as they are. Returns the model.
        """),
    Task("model", "model.py", "visible", 30, "the queries are the last of the keys", """
        keep (B, T), queries and keys are numbers, causal is a bool -> (B, 1, queries, keys), boolean. `keep` is about
        the last T keys; keys before them are a prompt, which all may see. Causal: query i is key
        keys - queries + i, and sees itself and what stands before it. A pad that sees nothing would be a row of
        NaN: in a causal mask every query sees itself.
        """),
    Task("model", "model.py", "Block.forward", 20, "the two lines at the top of this file, with their slots", """
        The residual adds, norm1 and norm2 first or last as self.norm_first says, and the slots after_attention and
        after_mlp on a sub-layer's output, before the residual add. attention(x, mask, cache, here) returns one place
        a text if `here` is given; only(x, here) takes the same places of x.
        """),
    Task("lora", "methods/lora.py", "LoRALinear.__init__", 15, "super().__init__() first; A and B: nn.Parameters", """
        linear.weight is W_0 (d_out, d_in). Attributes: linear, the frozen Linear itself; the Parameters A (r, d_in)
        and B (d_out, r), on the device of the weight; scale = alpha / r. B is zero. A is drawn from a normal of
        standard deviation 1 / sqrt(3 d_in), which is the spread of U(-1/sqrt(d_in), 1/sqrt(d_in)). Both are float32,
        whatever the weight is. The Linear has been frozen by `attach` already.
        """),
    Task("lora", "methods/lora.py", "LoRALinear.forward", 15, "the frozen Linear, and beside it two thin products", """
        x (..., d_in) -> (..., d_out): what the frozen Linear makes of x, plus the update. First A, then B: the
        product B A (d_out, d_in) is never formed. A text is a row of x, so it is x Aᵀ, then Bᵀ: F.linear does both.
        """),
    Task("lora", "methods/lora.py", "LoRALinear.merged", 10, "add the update to the weight, hand the Linear back", """
        W_0 + (alpha / r) B A, in the weight of self.linear, in place. Returns that Linear: the wrapper is gone. It is
        called under no_grad.
        """),
    Task("adapter", "methods/adapter.py", "Bottleneck.forward", 10, "down, gelu, up, and the skip around them", """
        A(h) = h + W_up gelu(W_down h + b_down) + b_up for h (B, T, d); self.down and self.up are the two Linears. The
        exact gelu.
        """),
    Task("prompt", "methods/prompt.py", "SoftPrompt.forward", 10, "the same P vectors in front of every text", """
        x (B, T, D) -> (B, P + T, D): self.vectors (P, D) stand in front of each of the B texts, in the precision of x.
        """),
    Task("prefix", "methods/prefix.py", "in_front", 30, "cut a row into key and value, each into heads", """
        rows (P, 2 D): D of a key, then D of a value; k and v (B, H, S, D/H); mask (B, 1, T, S) or None. Returns k and
        v (B, H, P + S, D/H) with the rows first, the same for every text (expand them to B; nothing has to be cast),
        head h having the columns h D/H to (h + 1) D/H of each row; and the mask (B, 1, T, P + S), where all may see the
        rows; None stays None.
        """),
    Task("fastfood", "fastfood.py", "butterfly", 20, "two halves, two half transforms", """
        Over the last axis; a and b are its first and its second half, not its even and its odd places. H_1 is the
        identity. `hadamard` and Fastfood build their small matrices with this function: while it is wrong, so are they.
        """),
    Task("fastfood", "fastfood.py", "plain", 30, "one line for each step of the formula, from right to left", """
        P_b z = H (G * (H (B * z))[Pi]) / sqrt(D sum G^2) for each block b, with its own row of B, Pi and G: entry i of
        x[Pi] is x[Pi[i]], and the sum is over this row of G. Behind z stand zeros, to n = B.shape[1] entries in all. Of
        the blocks put end to end the first D entries are P z. (In the example d = 5, and 7 blocks of 8 make 50.)
        """),
    Task("intrinsic", "methods/intrinsic.py", "Subspace.theta", 25, "one projection, cut into the base's shapes", """
        theta_0 + P z for own_parameters(self.model), which come in the order of P's rows: self.project(self.z) is P z
        (D,), a part for each of them. With self.scales (SAID) the part of parameter i is multiplied by the scale of
        its layer, self.layers[i].
        """),
    Task("mask", "methods/mask.py", "fisher", 40, "square each example's gradient, then take the mean", """
        F_i = 1/N sum over n of (d loss(x_n) / d theta_i)^2 for the own_parameters(model), end to end, (D,). The N
        examples are at most EXAMPLES, drawn from task.train by torch.randperm, each a batch of its own
        (tasks.collate with pad 0, tasks.loss, on the model's device). No .grad of the model is touched:
        torch.autograd.grad on detached copies of theta that require a gradient, put in place by functional_call; a
        parameter that the loss does not reach has the gradient zero.
        """),
    Task("tasks", "data/tasks.py", "collate", 15, "as long as the longest; three kinds of padding", """
        Of an Example its ids and targets are read. Behind the end of a shorter text stand: in ids `pad`, or 0 if that
        is None; in keep False; in targets -100, where nothing is predicted.
        """),
    Task("tasks", "data/tasks.py", "answer", 25, "ask the model only where a target stands", """
        model(ids, keep, at=...) returns the logits (N, V) where `at` is True. With task.words, the token ids of the C
        label words, the logits are those of these words alone, (N, C), and what is wanted is the place of the target in
        task.words. The logits pass through finite().
        """),
)
