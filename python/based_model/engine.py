"""Continuous batching: sequences join and leave a running batch, one token each a step.

    engine = Engine(model, slots=32)
    request = engine.add(prompt, max_new_tokens=100)
    for request, token in engine.run(): ...

The states of all running sequences lie in one pool, allocated once; row i of a batch is slot i of
the pool, -1 where nothing runs. On a GPU a step is one CUDA graph for each batch size, sampling
included, and tokens stay on the device: the host learns of those of a step while the next one
runs. A prompt is read in chunks of equal length between the steps, alone. So the tokens of a
request depend on the request and on the size of the batch it runs in, and on nothing else: not on
its slot, its neighbours, or when they come and go.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from based_model.config import ConfigError
from based_model.mixers import LinearMixer
from based_model.model import Based, ModelState
from based_model.sampling import Draws, Sampling, sample
from based_model.state_file import Prefix


@dataclass(eq=False)
class Request:
    """A text to continue, and what has come of it."""

    prompt: Tensor | Prefix  # tokens (T,), or one text that was read already
    max_new_tokens: int
    sampling: Sampling
    seed: int
    end_token: int | None
    tokens: list[int] = field(default_factory=list)  # as far as the host knows
    finished: bool = False  # no more tokens will come
    slot: int | None = None  # while it runs
    drawn: int = 0  # tokens that the device was asked for
    length: int = 0  # tokens in its state


class Engine:
    """Runs up to `slots` sequences at a time.

    Args:
        model: of weights in the dtype to compute in; it runs on their device.
        slots: sequences that run at the same time; more wait for their turn.
        context: tokens of a prompt and its continuation that attention layers have room for; other
            layers need none.
        chunk: tokens of prompts to read between two steps.
        batch_sizes: what the rows of a step are rounded up to; by default powers of two.
    """

    def __init__(
        self,
        model: Based,
        slots: int = 8,
        *,
        context: int = 0,
        chunk: int = 1024,
        batch_sizes: Sequence[int] | None = None,
    ):
        if batch_sizes is None:
            batch_sizes = [2**i for i in range(slots.bit_length()) if 2**i < slots] + [slots]
        if slots < 1 or chunk < 1 or max(batch_sizes, default=0) != slots:
            raise ConfigError(
                "slots, chunk, batch_sizes: expected at least 1 slot, chunks of at least 1 token, "
                f"and slots as the largest size, got {slots}, {chunk}, {list(batch_sizes)}"
            )
        self.model, self.slots, self.context, self.chunk = model, slots, context, chunk
        self.batch_sizes = sorted(batch_sizes)
        self.device = model.embedding.weight.device
        self.grows = "attention" in model.config.layers
        for layer in model.layers:
            if isinstance(layer.mixer, LinearMixer):
                layer.mixer.join_projections()
        self.state = model.new_state(slots, context)
        if self.device.type == "cuda" and slots * model.config.nheads >= 2048:
            model.defer_writes(self.state)  # measured faster where the states fill the GPU
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=self.device)  # newest of each
        self.indices = torch.full_like(self.tokens, -1)
        self.draws = Draws.greedy(slots, self.device)
        self.rows: list[Request | None] = [None] * slots
        self.waiting: deque[Request] = deque()
        self.reading: tuple[Request, deque[Tensor], ModelState | None] | None = None
        self.sent: deque = deque()  # tokens on their way to the host
        self.graphs: dict = {}
        self.memory = None  # that the graphs share: one runs at a time
        if self.device.type == "cuda":
            # To capture them on: torch's own is of the GPU that was current at its first capture.
            self.stream = torch.cuda.Stream(self.device)

    # ---- what a user calls ---------------------------------------------------------------------

    def add(
        self,
        prompt: Sequence[int] | Tensor | Prefix,
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        *,
        seed: int = 0,
        end_token: int | None = None,
    ) -> Request:
        """Queues a text: token ids (at least one), or a Prefix of one row, which is not changed.

        It ends after max_new_tokens or behind end_token. ConfigError on what cannot run.
        """
        request = Request(prompt, max_new_tokens, sampling, seed, end_token)
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected >= 1, got {max_new_tokens}")
        if isinstance(prompt, Prefix):
            if len(prompt) != 1:
                raise ConfigError(f"prompt: expected a prefix of one text, got {len(prompt)}")
        else:
            request.prompt = prompt = torch.as_tensor(prompt, dtype=torch.int64, device="cpu")
            size = self.model.config.vocab_size
            if prompt.ndim != 1 or not len(prompt) or prompt.min() < 0 or prompt.max() >= size:
                raise ConfigError(
                    f"prompt: expected at least one token, each in 0 ... {size - 1}, got {prompt}"
                )
            request.length = len(prompt)
        if self.grows:
            if isinstance(prompt, Prefix):
                request.length = int(prompt.state.positions)
            # The last token is not read any more.
            if request.length + max_new_tokens - 1 > self.context:
                raise ConfigError(
                    f"context: expected room for {request.length} + {max_new_tokens - 1} tokens, "
                    f"got {self.context}"
                )
        self.waiting.append(request)
        return request

    @torch.no_grad()
    def step(self) -> list[tuple[Request, int]]:
        """Reads at most about `chunk` tokens of prompts, then makes one token of every sequence.

        Returns the tokens that reached the host: on a GPU those of the step before.
        """
        with torch.cuda.device(self.device.index if self.device.type == "cuda" else -1):
            return self._step()

    def run(self) -> Iterator[tuple[Request, int]]:
        """Steps until all requests are finished; every (request, token) as it comes."""
        while self.busy:
            yield from self.step()

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting or self.reading or any(self.rows) or self.sent)

    def cancel(self, request: Request):
        """Ends a request here: it leaves, and no more of its tokens are returned."""
        if request in self.waiting:
            self.waiting.remove(request)
        if self.reading is not None and self.reading[0] is request:
            self.reading = None
        self._leave(request)
        request.finished = True

    # ---- joining and leaving -------------------------------------------------------------------

    def _read_prompts(self):
        """Reads prompts, a chunk at a time; those that are done join."""
        budget = self.chunk
        while budget > 0 and (self.reading or (self.waiting and None in self.rows)):
            if self.reading is None:
                request = self.waiting.popleft()
                if isinstance(request.prompt, Prefix):
                    request.prompt.state.fold()
                    self._join(request, request.prompt.state, request.prompt.logits)
                    continue
                prompt = request.prompt
                if self.device.type == "cuda":
                    prompt = prompt.pin_memory().to(self.device, non_blocking=True)
                self.reading = request, deque(prompt.split(self.chunk)), None
            request, chunks, state = self.reading
            chunk = chunks.popleft()
            logits, state = self.model.prefill(chunk[None], state)
            budget -= len(chunk)
            self.reading = request, chunks, state
            if not chunks:
                self.reading = None
                self._join(request, state, logits)

    def _join(self, request: Request, state: ModelState, logits: Tensor):
        """Draws the first token of a text that was read, and gives it a slot for the others."""
        slot = self.rows.index(None)
        self.draws.set(slot, request.sampling, request.seed)
        draws = self.draws[slot : slot + 1]
        token = sample(logits, draws, state.positions, request.sampling.restricted)
        self._send({0: request}, token)
        request.drawn = 1
        if request.max_new_tokens == 1:
            return
        for mixer, targets, sources in zip(
            self.model.config.layers, self.state.layers, state.layers, strict=True
        ):
            for target, source in zip(targets, sources):  # rings of no token are left as they are
                if mixer == "attention":
                    target[slot, : request.length] = source[0, : request.length]
                    target[slot, request.length :].zero_()
                else:
                    target[slot] = source[0]
        self.state.positions[slot] = state.positions[0]
        if self.state.fill is not None:
            self.state.fill[slot].zero_()
        self.tokens[slot] = token[0]
        self._occupy(slot, request)

    def _occupy(self, slot: int, request: Request):
        self.rows[slot], request.slot = request, slot
        self.indices[slot].fill_(slot)  # to assign a number would wait for the GPU

    def _leave(self, request: Request):
        """Frees its slot, if it has one. What is on its way to the host is still returned."""
        if request.slot is not None:
            self.rows[request.slot] = None
            self.indices[request.slot].fill_(-1)
            request.slot = None

    def _shrink(self, count: int):
        """Moves what lies behind the smallest batch that holds so many sequences into it."""
        for source in range(self._batch_size(count), self.slots):
            request = self.rows[source]
            if request is not None:
                target = self.rows.index(None)
                for x in self._tensors():
                    x[target] = x[source]
                self._leave(request)
                self._occupy(target, request)

    def _tensors(self) -> list[Tensor]:
        """All that a slot consists of."""
        state = self.state
        fill = [] if state.fill is None else [state.fill]
        return [*sum(state.layers, ()), state.positions, *fill, self.tokens, *self.draws.tensors()]

    # ---- one step ------------------------------------------------------------------------------

    def _step(self) -> list[tuple[Request, int]]:
        self._read_prompts()
        running = [request for request in self.rows if request is not None]
        if running:
            self._shrink(len(running))
            batch = self._launch()
            self._send({request.slot: request for request in running}, self.tokens[:batch])
            for request in running:
                request.drawn += 1
                request.length += 1
                if request.drawn == request.max_new_tokens:
                    self._leave(request)
        return self._arrived(1 if running and self.device.type == "cuda" else 0)

    def _launch(self) -> int:
        """One token of every row, in place in self.tokens; returns the size of the batch."""
        running = [request for request in self.rows if request is not None]
        batch = self._batch_size(1 + max(request.slot for request in running))
        restricted = any(request.sampling.restricted for request in running)
        seen = 0
        if self.grows:  # in powers of two: each is a graph
            longest = 1 + max(request.length for request in running)
            seen = min(self.context, 1 << max(8, (longest - 1).bit_length()))
        if self.device.type == "cuda":
            self._graph(batch, restricted, seen).replay()
        else:
            self._decode(batch, restricted, seen)
        return batch

    def _batch_size(self, rows: int) -> int:
        return next(size for size in self.batch_sizes if size >= rows)

    def _decode(self, batch: int, restricted: bool, seen: int, idle: bool = False):
        """A step of the first rows; an idle one changes nothing."""
        state, rows = self.state, slice(batch)
        tokens, positions, indices = self.tokens[rows], state.positions[rows], self.indices[rows]
        fill = None if state.fill is None else state.fill[rows]
        if idle:
            tokens, positions, indices = tokens.clone(), positions.clone(), indices * 0 - 1
            fill = None if fill is None else fill.clone()
        layers = [tuple(x[rows] for x in layer) for layer in state.layers]
        view = ModelState(layers, positions, fill, state.capacity, state.counters)
        logits = self.model.decode(tokens, view, indices, seen)
        tokens.copy_(sample(logits, self.draws[rows], positions, restricted))

    def _graph(self, *step) -> torch.cuda.CUDAGraph:
        """The graph of a step, captured when it is first needed."""
        if step not in self.graphs:
            current = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):  # compiles, and has libraries choose their kernels
                self._decode(*step, idle=True)
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.memory, stream=self.stream):
                self._decode(*step)
            self.graphs[step], self.memory = graph, graph.pool()
        return self.graphs[step]

    def _send(self, owners: dict[int, Request], tokens: Tensor):
        """Sends tokens to the host, without waiting; owners says whose they are, by place."""
        if self.device.type == "cuda":
            host = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=True)
            host.copy_(tokens, non_blocking=True)
            there = torch.cuda.Event()
            there.record(torch.cuda.current_stream(self.device))
        else:
            host, there = tokens.clone(), None
        self.sent.append((owners, host, there))

    def _arrived(self, still_on_their_way: int) -> list[tuple[Request, int]]:
        """What was sent before the last so many."""
        arrived = []
        while len(self.sent) > still_on_their_way:
            owners, host, there = self.sent.popleft()
            if there is not None:
                there.synchronize()
            tokens = host.tolist()
            for place, request in owners.items():
                if request.finished:  # a step too far, or cancelled
                    continue
                token = tokens[place]
                request.tokens.append(token)
                arrived.append((request, token))
                if token == request.end_token or len(request.tokens) == request.max_new_tokens:
                    request.finished = True
                    self._leave(request)
        return arrived
