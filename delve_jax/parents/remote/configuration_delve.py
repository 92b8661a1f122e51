"""Configuration of an exported DELVE: K expert streams behind one pooled head.

`streams` is a list with one dict per expert: its name, family ("mamba", "rwkv", "neox"), sizes and
`ranks` (map name -> true rank per layer; a map that is not named there is dense), and, where MLPs
were pruned, `neurons` (their width in each layer).
"""

from transformers import PretrainedConfig

RECURRENT, ATTENTION = "linear_attention", "full_attention"


class DelveConfig(PretrainedConfig):
    """J = `latents`: 1 pools log-linearly (plain logits), K is a mixture (log-probabilities),
    in between a mixture of J log-linear pools. `connectors`: what a stream hears at the hub.

    `layer_types` is flat: one entry per expert block, stream after stream, which is what
    `transformers.DynamicCache` reads: Mamba and RWKV blocks keep a state, NeoX keys and values.
    """

    model_type = "delve"

    def __init__(
        self,
        streams=None,
        n_superblocks=1,
        latents=1,
        connectors="none",
        hub_rank=8,
        gate_proj=32,
        gate_hidden=64,
        ffn_skip=0.0,
        codes=(),
        vocab_size=None,
        layout="factored",
        teachers=(),
        initializer_range=0.02,
        use_cache=True,
        **kwargs,
    ):
        self.streams = [dict(stream) for stream in streams or []]
        self.n_superblocks = n_superblocks
        self.latents = latents
        self.connectors = connectors
        self.hub_rank = hub_rank
        self.gate_proj = gate_proj
        self.gate_hidden = gate_hidden
        self.ffn_skip = ffn_skip  # weight below which a token does without an FFN; 0: no routers
        self.codes = list(codes)  # tables, "embed" and "head", that the streams have in common
        self.layout = layout
        self.teachers = list(teachers)
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        if self.streams and not 1 <= latents <= len(self.streams):
            raise ValueError(f"latents={latents} must lie between 1 and the number of streams")
        if connectors not in ("hub", "cross", "self", "none"):
            raise ValueError(f"connectors={connectors!r} is unknown")
        sizes = {stream["vocab_size"] for stream in self.streams}
        self.vocab_size = max(sizes, default=0) if vocab_size is None else vocab_size
        if sizes - {self.vocab_size}:
            raise ValueError(f"streams must share one vocabulary of {self.vocab_size}, not {sizes}")
        # derived from the streams, so an edited or older config.json cannot disagree with them
        self.hidden_size = sum(stream["d_model"] for stream in self.streams)
        self.num_hidden_layers = sum(stream["n_layers"] for stream in self.streams)
        self.layer_types = [
            ATTENTION if stream["family"] == "neox" else RECURRENT
            for stream in self.streams
            for _ in range(stream["n_layers"])
        ]
        self.number_of_conv_states = 2  # RWKV shifts twice per block: time-mix and channel-mix
        for derived in ("hidden_size", "num_hidden_layers", "layer_types", "number_of_conv_states"):
            kwargs.pop(derived, None)
        kwargs["tie_word_embeddings"] = False  # tying is per stream, inside `streams`
        super().__init__(**kwargs)

    def boundaries(self, stream: int) -> list[int]:
        """First layer of each superblock of a stream, and its depth at the end (S + 1 numbers)."""
        depth, total = self.streams[stream]["n_layers"], self.n_superblocks
        return [(2 * s * depth + total) // (2 * total) for s in range(total + 1)]
