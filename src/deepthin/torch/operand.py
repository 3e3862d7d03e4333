"""A generated weight in use: decoded as a whole or row by row, or multiplied without being decoded."""

import math
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from deepthin.kernels import chains, products
from deepthin.kernels.chains import Layout
from deepthin.kernels.costs import Path, choose_native
from deepthin.method import Flat
from deepthin.methods.factor import Factored, Window
from deepthin.storage.contents import Part
from deepthin.torch import accelerated, multiply
from deepthin.torch.cache import StateCache
from deepthin.torch.core_operators import chain_product, trained_core_linear
from deepthin.torch.evaluated import Evaluated, current, decoded
from deepthin.torch.multiply import Case
from deepthin.torch.operators import product, short_ways, takes, trained_linear
from deepthin.torch.rounding import RoundedState
from deepthin.torch.snapshot import is_exported, warn_of_dense
from deepthin.torch.tracing import as_leaf, is_plain, is_portable, is_recorded

_GATHER = 4  # upper bound on the time of a row decoded alone over that of one among all (a training step)
_TABLE = 1 << 24  # entries that an accelerator decodes, and whose gradients it sums, as fast as it starts ``rows``
_BATCHES = 1000  # sizes of inputs for which a choice is noted
_WAYS: dict[Path, int] = {"native-direct": 1, "native-fft": 2, "native-cores": 1}
_CAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts
_PLAIN = (Tensor, torch.nn.Parameter)
_TORCH = cast(Any, torch)


class Operand(RoundedState):
    """Tensors that layers use: decoded from a state, or multiplied by it.

    Attributes:
        parts: Shape and scale of each tensor, in the order in which they are cut from the flattened matrix.
        plans: For each tensor its window in the factors' product; None where it must be decoded.
        chains: For each tensor the chain of cores that it is; None where it is none, or not alone in the code.
        kernels: As ``plans``, for each kernel of a convolution, of outputs x (inputs * taps).
    """

    parts: tuple[Part, ...]
    plans: tuple[Window | None, ...]
    chains: tuple[Layout | None, ...]
    kernels: tuple[Window | None, ...]
    _cuts: tuple[tuple[int, int], ...]  # begin and end of each tensor in the flattened matrix
    _places: "tuple[accelerated.Place | None, ...]"  # of each tensor in the product of factors of any order
    # On an accelerator, by tensor, number of inputs, whether it is kept, and the type of autocast
    _decoding_pays: dict[tuple[int, int, bool, torch.dtype | None], bool]
    _windows: tuple[Window | None, ...]
    _operator_pays: tuple[bool, ...]
    _has_symbols: bool
    _sparse: StateCache[tuple[np.ndarray, np.ndarray]]
    _fast: "tuple[Any, ...] | None" = None  # native products by tensor, made at their first use
    _table: "tuple[Any, ...] | None" = None  # native look-ups of rows by tensor, likewise
    _known: "dict[Any, multiply.Way]"  # by tensor, shape of the inputs and whether there is no bias

    def forward(self, index: int = 0) -> Float[Tensor, "..."]:
        """Decode a tensor.

        Args:
            index: Which of the weight's tensors.

        Returns:
            The dense tensor, of its part's shape. On the CPU in evaluation, where the code needs no gradient, it is
            cached while the code is unchanged, and must not be written to.
        """
        if (leaf := as_leaf(self, index)) is not None:
            return cast(Any, leaf)
        held = None if torch.compiler.is_compiling() else self._held()
        if held is None:
            if not self.keeps_dense():
                return self._decode(index, self.floats())
            held = self._now()
        return self._dense_of(held, index)

    def _dense_of(self, held: Evaluated, index: int, kind: torch.dtype | None = None) -> Tensor:
        """A decoded tensor from what evaluation holds, decoded if need be; in another type than the code's if given."""
        key = index if kind is None else (index, kind)
        dense, version = held.dense.get(key, (None, 0))
        if dense is not None and dense._version != version:  # a caller wrote to it, and so perhaps to the floats
            self._forget()
            held, dense = self._now(), None
        if dense is None:
            with torch.inference_mode(False), torch.no_grad():  # a gradient of the input may need it later
                dense = self._decode(index, held.floats, kind)  # of copies: another thread may write to the code
                if not accelerated.on_accelerator(dense) or accelerated.may_keep(dense):
                    held.dense[key] = (dense, dense._version)
        return dense

    def decoded(self) -> Iterator[Tensor]:
        """Decode all tensors for a single use: nothing is cached, so that at most one is in memory.

        Yields:
            The dense tensors, in order. They have no gradient if the caller wants none (``torch.no_grad``).
        """
        floats = self.state() if self.direct else self._decode_floats(self.code())
        for index in range(len(self.parts)):
            yield self._decode(index, floats)

    def product(
        self, x: Float[Tensor, "*batch cols"], index: int = 0, bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """``x @ W.T + bias`` by the way with the least predicted cost (``deepthin.torch.multiply``).

        Args:
            x: Inputs, any number of leading dimensions.
            index: Which of the weight's tensors is W.
            bias: One number per output, or None.

        Returns:
            The outputs, with the leading dimensions of x. Under autocast structured ways compute in float32.
        """
        y = self._trained_way(x, index, bias) if self.training else self._short_way(x, index, bias)
        y = self._known_way(x, index, bias) if y is None and self._known else y
        if y is not None:
            return y
        if not isinstance(x, Tensor):  # a tracer's proxy, or a caller's mistake, which raises
            return multiply.DENSE.run(self, x, index, bias)
        if accelerated.on_accelerator(x) and (y := self._on_accelerator(x, index, bias)) is not None:
            return y
        case = self._case(x, index, bias)
        way = multiply.choose(case)
        if way.name in _WAYS and not torch.compiler.is_compiling() and self.keeps_dense():
            if (fast := self.short_way(index)) is not None:
                fast.choose(case.batch, _WAYS[way.name])
                self.floats()  # so that they are current
            y = self._short_way(x, index, bias)
            if y is not None:
                return y
        elif way.name in _WAYS and not torch.compiler.is_compiling() and self.training:
            self._note_training(case.batch, index)
        elif case.dense_ready and (way is multiply.DENSE or way is multiply.IN_TURN) and not torch.is_grad_enabled():
            self._note_way(way, x, index, bias)
        return way.run(self, x, index, bias)

    def _on_accelerator(self, x: Tensor, index: int, bias: Tensor | None) -> Tensor | None:
        """The product by the decoded matrix in few operations; None where another way is better or someone records."""
        if torch.compiler.is_compiling():
            return None
        held = None if self.training else self._held()  # None where someone records
        if held is None and is_recorded():
            return None
        device, kind = x.device.type, None
        if torch.is_autocast_enabled(device):
            if x.dtype not in _CAST or self._float_type() not in _CAST:
                return None
            kind = torch.get_autocast_dtype(device)
        if held is None and not self.training and self.keeps_dense():
            held = self._now()
        if held is not None:
            if self.parts[index].transposed or not self._decodes(index, x, True, kind):
                return None
            return F.linear(x, self._dense_of(held, index, kind), bias)
        place = self._places[index]
        if place is None or place.transposed or len(place.shape) != 2 or not self._decodes(index, x, False, kind):
            return None
        entries = self.__dict__["_parameters"] if self.direct and self._empty is None else self.floats()
        xf, wf = cast(Tensor, entries.get("xf")), cast(Tensor, entries.get("wf"))  # None where they are gathered before
        if type(xf) not in _PLAIN or type(wf) not in _PLAIN or type(x) is not Tensor:
            return None
        if kind is None and not xf.dtype is wf.dtype is x.dtype:
            return None  # an error, which the linear layer raises
        return accelerated.linear(x, xf, wf, bias, place, kind or x.dtype)

    def _float_type(self) -> torch.dtype:
        """That of the floats of the state, which is that of the decoded weight."""
        return next(t.dtype for entry in self._entries if (t := getattr(self, entry)).is_floating_point())

    def _decodes(self, index: int, x: Tensor, ready: bool, kind: torch.dtype | None) -> bool:
        """Whether the decoded matrix is predicted to be the faster way; noted, since the prediction takes longer."""
        key = index, x.shape.numel(), ready, kind
        pays = self._decoding_pays.get(key)
        if pays is None:
            if len(self._decoding_pays) > _BATCHES:
                self._decoding_pays.clear()
            pays = self._decoding_pays[key] = multiply.choose(self._case(x, index, None)) is multiply.DENSE
        return pays

    def rows_pay(self, places: Tensor, index: int = 0) -> bool:
        """Whether ``rows`` is predicted to be faster than decoding the whole matrix.

        Args:
            places: Row indices, of any shape.
            index: Which of the weight's tensors.

        Returns:
            True for few rows of a matrix in a product of two factors, on an accelerator of a large one; in graphs
            always, where their number may be symbolic.
        """
        part = self.parts[index]
        if self._windows[index] is None or part.transposed:
            return False
        if places.dtype not in (torch.int32, torch.int64) or places.is_meta:
            return False
        if is_recorded():
            return True
        few = places.numel() * _GATHER <= part.shape[0]
        return few and (not accelerated.on_accelerator(places) or math.prod(part.shape) >= _TABLE)

    def rows(self, places: Int[Tensor, "*batch"], index: int = 0) -> Float[Tensor, "*batch cols"]:
        """Decode single rows of a matrix in a product of two factors.

        Args:
            places: Row indices, int32 or int64, of any shape.
            index: Which of the weight's tensors.

        Returns:
            One row for each index, in the last dimension; padding rows are 0.

        Raises:
            IndexError: An index is out of range; not checked in graphs, and on an accelerator an error of the device.
        """
        rows = self._short_rows(places, index)
        if rows is not None:
            return rows
        part, floats, n = self.parts[index], self.floats(), cast(Window, self._windows[index]).plan.n
        count, cols = part.shape
        if not is_recorded() and places.numel():
            if accelerated.on_accelerator(places):
                _TORCH._assert_async(((places >= 0) & (places < count)).all())
            elif not 0 <= int(places.min()) <= int(places.max()) < count:
                raise IndexError(f"Rows go from {int(places.min())} to {int(places.max())}: the table has {count}.")
        start = self._cuts[index][0] + places.long() * cols
        blocks = (cols + n - 2) // n + 1  # rows of xf that a row of the matrix may touch; it may end before the last
        touched = (start // n)[..., None] + torch.arange(blocks, device=places.device)
        entries = (F.embedding(touched.clamp(max=len(floats["xf"]) - 1), floats["xf"]) @ floats["wf"]).flatten(-2)
        within = (start % n)[..., None] + torch.arange(cols, device=places.device)
        made = entries.gather(-1, within) * part.scale
        return made if part.zero_row is None else made * (places != part.zero_row)[..., None]

    def _short_rows(self, places: Tensor, index: int) -> Tensor | None:
        """The rows in a single native call; None where it does not apply."""
        if not short_ways or torch.compiler.is_compiling():
            return None
        if self._table is None:
            self._table = tuple(self._rows_of(index) for index in range(len(self.parts)))
        table = self._table[index]
        if table is None or (entries := self._short_entries()) is None:
            return None
        return table(places, entries.get("xf"), entries.get("wf"))

    def _rows_of(self, index: int) -> Any:
        """The native look-up of single rows; None where the tensor has none."""
        window, part = self._windows[index], self.parts[index]
        if window is None or part.transposed:
            return None
        zero_row = -1 if part.zero_row is None else part.zero_row
        place = (*part.shape, self._cuts[index][0], *self.decoder.code_shapes()["xf"], window.plan.n)
        return products.native().Rows(*place, part.scale, zero_row, part.shape[0] // _GATHER)

    def _short_entries(self) -> Mapping[str, Any] | None:
        """The code as native calls read it; None where it may not be current."""
        if self.direct:
            return self.__dict__["_parameters"] or self.state()
        held = current(self.__dict__)
        return None if held is None else held.floats

    def _short_way(self, x: Tensor, index: int, bias: Tensor | None) -> Tensor | None:
        """The native product in a single call; None where it does not apply or was not used for this batch before."""
        if self._fast is None or self.training or torch.compiler.is_compiling():
            return None
        if (fast := self._fast[index]) is None or (entries := self._short_entries()) is None:
            return None
        return fast(x, entries, bias)

    def _trained_way(self, x: Tensor, index: int, bias: Tensor | None) -> Tensor | None:
        """The native product and its gradients in a training; None where it was not used for this batch before."""
        if self._fast is None or torch.compiler.is_compiling() or (fast := self._fast[index]) is None:
            return None
        own = self.__dict__["_parameters"]
        ways = fast.trained(x, own, bias)
        if not ways:
            return None
        floats = own if self.direct and not self._exact and self._empty is None else self.floats()
        scale, window = self.parts[index].scale, self.plans[index]
        fused = bias if scale == 1.0 else None
        if window is None:
            entries = [floats[entry] for entry in self.decoder.code_shapes()]
            y = trained_core_linear(cast(Layout, self.chains[index]), fast, entries, x, fused)
        else:
            xf = floats["xf"]
            xf = xf if len(xf) == window.stop - window.first else xf[window.first : window.stop]
            y = trained_linear(fast, ways, x, xf, floats["wf"], fused, window.plan.shape[0], window.offset)
        if scale == 1.0:
            return y
        return y * scale if bias is None else y * scale + bias

    def _known_way(self, x: Tensor, index: int, bias: Tensor | None) -> Tensor | None:
        """The product by the way that was chosen before for such operands in evaluation; None where one may differ."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor or not takes(x, bias):
            return None
        way = self._known.get((index, x.shape, bias is None))
        if way is multiply.DENSE:
            dense = decoded(self, index)
            return None if dense is None else multiply.DENSE.multiply(self, x, index, bias, dense)
        return None if way is None or current(self.__dict__) is None else way.run(self, x, index, bias)

    def _note_way(self, way: Any, x: Tensor, index: int, bias: Tensor | None) -> None:
        """Take this way from now on, for operands of these shapes, while what evaluation holds is current."""
        if takes(x, bias) and not is_recorded():
            if len(self._known) > 1000:
                self._known.clear()
            self._now()
            self._known[index, x.shape, bias is None] = way

    def _note_training(self, batch: int, index: int) -> None:
        """Use the native product for this batch from now on, by the ways that are predicted to be faster."""
        fast = self.short_way(index)
        if fast is not None and self.plans[index] is None:
            fast.choose_training(batch, 1)
        elif fast is not None:
            plan = cast(Window, self.plans[index]).plan
            forward, backward = (choose_native(plan, batch, training) == "native-fft" for training in (False, True))
            fast.choose_training(batch, 1 + 2 * forward + 4 * backward)

    def short_way(self, index: int) -> Any:
        """The native product of a tensor; its ``choose`` says for which batches it may be used.

        Args:
            index: Which of the weight's tensors.

        Returns:
            A callable as ``operators.product`` returns it; None without native code or a structured product.
        """
        if self._fast is None:
            self._fast = tuple(self._product_of(index) for index in range(len(self.parts)))
        return self._fast[index]

    def _product_of(self, index: int) -> Any:
        plan, part = self.plans[index], self.parts[index]
        if plan is not None:
            return product(plan[0], plan[1], plan[3], part.scale)
        return None if self.chains[index] is None else chain_product(self.decoder, part.scale)

    def _chain(self, index: int) -> Layout | None:
        """The chain of cores that a matrix is; None where it is none, or the code holds more than this matrix."""
        part = self.parts[index]
        alone = len(self.parts) == 1 and len(part.shape) == 2
        whole = alone and not part.transposed and part.zero_row is None
        return chains.layout_of(self.decoder) if whole else None

    def path(self, x: Tensor, index: int = 0) -> Path:
        """The way by which ``product`` would multiply ``x`` now.

        Args:
            x: Inputs.
            index: Which of the weight's tensors.

        Returns:
            Its name. It is ``dense`` in exported or transformed graphs, where the weight is decoded in plain
            operations, and for inputs whose shape or dtype does not fit, which raise as in a linear layer.
        """
        return multiply.choose(self._case(x, index, None)).name

    def _case(self, x: Tensor, index: int, bias: Tensor | None) -> Case:
        """What the choice of a way depends on, for these operands."""
        window, part = self.plans[index], self.parts[index]
        dense = Case(self.decoder, None, 0, False)  # the decoded weight
        if x.is_meta or x.is_nested or x.shape[-1:] != (self._matrix(index)[1:] if len(part.shape) == 2 else ()):
            return dense
        floats = self.__dict__["_parameters"] if not torch.compiler.is_compiling() else None  # have the factors' dtype
        latents = tuple((floats or self.state()).values())
        like, autocast = latents[0], torch.is_autocast_enabled(x.device.type)
        if not x.is_floating_point() or (x.dtype != like.dtype and not autocast):
            return dense
        recorded = is_recorded()  # the batch may be a symbol there: one choice for all
        if window is not None:
            elsewhere = recorded and is_portable()  # where the floats before rounding must not even be looked at
            native = not elsewhere and takes(*latents) and (autocast or takes(x))
            if recorded:
                pays = native and self._operator_pays[index]
                return Case(self.decoder, window, 0, False, native=True, traced=True) if pays else dense
            batch, device = x.numel() // window.plan.shape[1], multiply.timed_device(x)
            return Case(self.decoder, window, batch, self.keeps_dense(), native=native, device=device)
        if autocast or len(self.parts) > 1 or part.transposed or part.zero_row is not None:
            return dense
        if recorded:
            pays = not is_portable() and self._operator_pays[index] and takes(x, *latents)
            return Case(self.decoder, None, 0, False, native=True, whole=True, traced=True) if pays else dense
        gradients = torch.is_grad_enabled()
        return Case(
            self.decoder,
            None,
            x.numel() // part.shape[1],
            self.keeps_dense(),
            native=takes(x, *latents),
            whole=True,
            detached=not (gradients and x.requires_grad)
            and (bias is None or (takes(bias) and not (gradients and bias.requires_grad))),
            direct=self.direct,
            levels=products.levels() if self._has_symbols else (0, 0),
            device=multiply.timed_device(x),
        )

    def sparse_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The positions of a sparse matrix as compressed sparse rows; cached.

        Returns:
            The column of each stored weight, int32, and the index of each row's first one, rows + 1 numbers.
        """
        (rows, cols), positions = self.decoder.shape, self.floats()["positions"]
        csr = self._sparse.get([positions])
        if csr is None:
            with torch.inference_mode(False), torch.no_grad():
                positions = positions.clone() if self.direct else positions  # nobody writes to decoded ones
                wide = positions.long()
                starts = torch.searchsorted(wide, torch.arange(rows + 1) * cols)
                columns = (wide % cols).numpy().astype(np.int32)
                csr = self._sparse.put([positions], (columns, starts.numpy()))
        return csr

    def _window(self, index: int) -> Window | None:
        """Where a tensor lies in a product of two factors; None where the weight must be decoded."""
        part = self.parts[index]
        if not isinstance(self.decoder, Factored) or len(part.shape) != 2:
            return None
        return self.decoder.window(self._cuts[index][0], self._matrix(index))

    def _kernel(self, index: int) -> Window | None:
        """Where a convolution's kernel lies in a product of two factors, as a matrix of outputs x (inputs * taps)."""
        part = self.parts[index]
        if not isinstance(self.decoder, Factored) or len(part.shape) < 3 or part.transposed:
            return None
        window = self.decoder.window(self._cuts[index][0], (part.shape[0], math.prod(part.shape[1:])))
        return None if window is None or (window.is_rank and window.offset) else window

    def _matrix(self, index: int) -> tuple[int, int]:
        """(outputs, inputs) of a two-dimensional tensor."""
        rows, cols = self.parts[index].shape
        return (cols, rows) if self.parts[index].transposed else (rows, cols)

    def _decode(self, index: int, floats: Mapping[str, Tensor], kind: torch.dtype | None = None) -> Tensor:
        if is_exported() and len(self.parts[index].shape) > 1 and not torch.compiler.is_dynamo_compiling():
            warn_of_dense()
        place = self._places[index]
        if place is not None and accelerated.on_accelerator(floats["xf"]):
            xf, wf = floats["xf"], floats["wf"]
            if is_recorded() or not is_plain(xf, wf) or xf.dtype is not wf.dtype:
                dense = accelerated.plain_decode(xf, wf, place)
                return dense if kind is None else dense.to(kind)
            return accelerated.decode(xf, wf, place, kind)
        dense = self._decode_by_method(index, floats)
        return dense if kind is None else dense.to(kind)

    def _decode_by_method(self, index: int, floats: Mapping[str, Tensor]) -> Tensor:
        (start, stop), decoder = self._cuts[index], self.decoder
        code, device = {**self._derived(), **self._wide(floats)}, next(iter(floats.values())).device.type
        # As a dense parameter: its type is the code's, which normalisation and the cache need, and layers cast it.
        cast_off = device != "meta" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if cast_off else nullcontext():
            if isinstance(decoder, Flat):
                flat = decoder.decode_flat(code, start, stop, _TORCH)
            else:
                flat = decoder.decode(code, _TORCH).reshape(-1)[start:stop]
            return self.parts[index].cut(flat, _TORCH)

    def keeps_dense(self) -> bool:
        """Whether the dense weight is cached.

        Returns:
            True in evaluation, where the code needs no gradient, nobody records, and there is memory.
        """
        if self.training or self._wants_gradient() or not self._may_cache() or not self._may_hold():
            return False
        return not any(getattr(self, entry).is_meta for entry in self._entries)
