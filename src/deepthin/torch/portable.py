"""A copy of a thin model in plain operations on small constants, which every exporter and every runtime takes.

Runtimes compute once what follows from constants, so no product of constants may be as large as the dense weight.
Inputs are therefore multiplied by the code: by one factor, then by windows of the other (docs/deploy.md). Integers of a
code stay integers, of 8, 4 or 2 bits.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deepthin.errors import ConfigError
from deepthin.method import Flat, InTurn
from deepthin.methods.factor import Window
from deepthin.methods.float_coding import FloatCoding, stored_by
from deepthin.torch.generated import ThinLayer
from deepthin.torch.layers import ThinEmbedding, ThinMultiheadAttention
from deepthin.torch.packed import PackedIntegers
from deepthin.torch.portable_attention import PortableAttention
from deepthin.torch.product import multiply_in_turn
from deepthin.torch.sequential import make_plain_sequential
from deepthin.torch.weight import ThinPart, ThinWeight
from deepthin.torch.wrapped import check_plain

Form = Literal["structured", "factors in turn", "single rows", "decoded in the graph", "decoded at export"]
"""How a portable weight is computed. Only the last two ever make the dense weight."""
Stage = Literal["band", "convolution"]
"""How inputs are correlated with ``wf``: by a banded matrix or by a convolution; runtimes differ in which is faster."""

_CHANNELS = 16  # outputs of the convolution at each place; its kernel is so much longer than wf
_BAND = 1 / 8  # upper bound on the size of the banded matrix over that of the dense weight
_WINDOWS = 1 / 2  # upper bound on the size of the windows over that of the dense weight
_COPIES = 1.25  # upper bound on the size of the stored windows over that of the factor
_KERNEL = 8192  # bytes up to which the convolution's kernel is stored; a longer one is computed
_UNITS = 384  # of a recurrent layer from which a step by its codes is faster than one by decoded matrices
_SMALL = 4096  # bytes up to which a weight is stored dense
_TORCH = cast(Any, torch)


def portable(model: nn.Module, stage: Stage = "convolution", loops: bool = False, compact: bool = False) -> nn.Module:
    """Copy a model so that its thin layers consist of plain operations on constants of about the size of their codes.

    Every exporter takes the copy: torch.export, torch.onnx.export, ExecuTorch, LiteRT. Its batch and its lengths may
    vary wherever the model's may. It is for inference: it has no parameters for thin weights, and cannot be saved or
    trained.

    Products of two factors (``deepthin``, ``rank``, groups of them) multiply the input by the factors, Kronecker and
    tensor trains by theirs. An embedding decodes the rows that it is asked for. Kernels of convolutions, gates of
    recurrent layers, and methods without a structured form are decoded in the graph; methods whose tables are as large
    as the weight (``hashed``, ``shuffled``) and weights of up to 4 kB are decoded now. ``forms`` tells which.

    Args:
        model: A thin network, on the CPU.
        stage: How the input is correlated with ``wf``.
        loops: Whether recurrent layers of 384 units and more are to multiply by their codes at each step, for a format
            that has loops (``deepthin.torch.export.recurrent``); otherwise their matrices are decoded.
        compact: Whether integers are stored once, at the cost of copying them at each run, or when the file is loaded;
            otherwise in the order in which they are used, some 6 % more.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ConfigError: The model is wrapped, compiled, or has no values.
    """
    check_plain(model, "portable(MODEL)", replaces=False)
    model = copy.deepcopy(model).eval().requires_grad_(False)
    make_plain_sequential(model)
    codes: dict[int, PortableCode] = {}
    for layer in list(model.modules()):
        if not isinstance(layer, ThinLayer):
            continue
        attention = isinstance(layer, ThinMultiheadAttention)
        for name, part in list(cast(Any, layer.thin).items()):
            weight, index = (part.group, part.index) if isinstance(part, ThinPart) else (part, 0)
            if not weight.has_values():
                raise ConfigError("The model has no values: load a file, or call deepthin.torch.initialise(model).")
            code = codes[id(weight)] = codes.get(id(weight)) or PortableCode(weight.eval())
            multiplies = _multiplies(layer) or attention or (loops and _pays_in_a_loop(layer))
            use = (
                "rows"
                if isinstance(layer, ThinEmbedding)
                else "product"
                if multiplies and not name.startswith("bias")
                else "all"
            )
            layer.thin[name] = cast(Any, PortableWeight(weight, index, code, use, stage, compact))
        if attention:
            cast(Any, layer).__class__ = PortableAttention
            cast(Any, layer)._of_one_width = layer._qkv_same_embed_dim
            cast(Any, layer)._qkv_same_embed_dim = False  # else torch reads the dense weight for a kernel of its own
    for module in model.modules():
        if isinstance(module, PortableCode):
            module.drop_unused()
    return model


def forms(model: nn.Module) -> dict[str, Form]:
    """How each weight of a portable model is computed.

    Args:
        model: What ``portable`` returned.

    Returns:
        Name of the tensor, as in the dense model -> its form.
    """
    return {
        f"{path}.".lstrip(".") + name: weight.form
        for path, layer in model.named_modules()
        if isinstance(layer, ThinLayer)
        for name, weight in cast(Any, layer.thin).items()
        if isinstance(weight, PortableWeight)
    }


def _multiplies(layer: nn.Module) -> bool:
    """Whether a layer is a product with its matrix, however many leading dimensions the input has."""
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "ThinConv1D"


def _pays_in_a_loop(layer: nn.Module) -> bool:
    """Whether a step by the codes of the gates is faster than one by the decoded matrices (`benchmarks/export.py`)."""
    return isinstance(layer, nn.RNNBase) and not layer.proj_size and layer.hidden_size >= _UNITS


def _are_tables(code: Mapping[str, Tensor], shape: tuple[int, ...]) -> bool:
    """Whether the entries beside symbols are the same for each symbol: a step, or levels, not a number a row."""
    return all(value.numel() == 1 or value.numel() != shape[0] for value in code.values())


class PortableCode(nn.Module):
    """The stored code of a thin weight as constants: floats, and packed integers.

    Args:
        weight: The thin weight, of one tensor or of a group.

    Attributes:
        makes_dense: Whether a dense weight is computed from the constants in the graph.
    """

    def __init__(self, weight: ThinWeight) -> None:
        super().__init__()
        self.coding, self.decoder = FloatCoding(weight.method), FloatCoding(weight.method).decoder
        self.has_tables = bool(weight.method.derived())
        self.floats_used, self.makes_dense = False, False
        integers = weight.method.integers()
        self.entries = nn.ModuleDict()
        for entry, value in weight.code().items():
            if entry in integers or not value.is_floating_point():
                rising = entry in integers and integers[entry].rising
                self.entries[entry] = PackedIntegers(value, rising)
            else:
                self.register_buffer(entry, value.detach().cpu().clone())
        self.floats_of = [entry for entry in weight.code() if entry not in self.entries]

    def bytes(self) -> int:
        """Size of the constants.

        Returns:
            Bytes.
        """
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self) -> dict[str, Tensor]:
        """The code that ``decoder`` takes, computed from the constants.

        Returns:
            Entry -> tensor.
        """
        code = {entry: getattr(self, entry) for entry in self.floats_of}
        code |= {entry: integers() for entry, integers in self.entries.items()}
        return self.coding.decode(code, _TORCH)

    def drop_unused(self) -> None:
        """Remove the constants, if all weights hold what they need of them."""
        if not self.floats_used:
            for entry in self.floats_of:
                delattr(self, entry)
            self.entries, self.floats_of = nn.ModuleDict(), []


class PortableWeight(nn.Module):
    """One tensor of a thin weight in plain operations; it takes the place of the ThinWeight in its layer.

    Args:
        weight: The thin weight.
        index: Which of its tensors.
        code: Its constants, which all its tensors share.
        use: What the layer asks for: the product, single rows, or the whole tensor.
        stage: How inputs are correlated with ``wf``.
        compact: Whether integers are stored once.

    Attributes:
        form: How it is computed.
    """

    def __init__(
        self,
        weight: ThinWeight,
        index: int,
        code: PortableCode,
        use: Literal["product", "rows", "all"],
        stage: Stage = "convolution",
        compact: bool = False,
    ) -> None:
        super().__init__()
        self.part, self.decoder, (self.start, self.stop) = weight.parts[index], weight.decoder, weight._cuts[index]
        self.stage: Stage = stage
        window, alone = weight.plans[index], len(weight.parts) == 1
        area = math.prod(self.part.shape)
        self.form: Form = "decoded in the graph"
        dense_bytes = 4 * area
        if code.has_tables or dense_bytes <= max(_SMALL, code.bytes() if alone else 0):
            self.form = "decoded at export"
            with torch.no_grad():
                self.register_buffer("dense", weight(index).detach().clone())
            return
        if use == "product" and window is not None and window.read <= _WINDOWS * area:
            self.form = "structured"
        elif use == "rows" and weight._windows[index] is not None and not self.part.transposed:
            self.form = "single rows"
        elif use == "product" and alone and not self.part.transposed and isinstance(self.decoder, InTurn):
            self.form = "factors in turn"
        own = cast(Window, weight._windows[index]) if self.form in ("structured", "single rows") else None
        if own is not None:
            self.sizes, self.is_rank = own, own.is_rank
            once = compact and stored_by(weight.method, "xf") is not None
            if (
                self.form == "structured"
                and not self.is_rank
                and own.read <= _COPIES * own.rank * (own.stop - own.first)
                and not once
            ):
                with torch.no_grad():
                    if self._hold_windows(weight):
                        return
        code.floats_used = True
        code.makes_dense |= self.form == "decoded in the graph"
        self.code = code

    def forward(self) -> Float[Tensor, "..."]:
        """Decode the tensor.

        Returns:
            The dense tensor, of its part's shape.
        """
        if self.form == "decoded at export":
            return cast(Tensor, self.dense)
        floats = self.code()
        if isinstance(self.decoder, Flat):
            flat = self.decoder.decode_flat(floats, self.start, self.stop, _TORCH)
        else:
            flat = self.decoder.decode(floats, _TORCH).reshape(-1)[self.start : self.stop]
        return self.part.cut(flat, _TORCH)

    def product(
        self, x: Float[Tensor, "*batch cols"], index: int = 0, bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """``x @ W.T + bias``.

        Args:
            x: Inputs, any number of leading dimensions.
            index: Not used: this is one tensor.
            bias: One number for each output, or None.

        Returns:
            The outputs, with the leading dimensions of x.
        """
        if self.form == "structured":
            y = self.multiply(x.reshape(-1, self.sizes.cols), self.operands())
            y = y.reshape(*x.shape[:-1], self.sizes.rows)
        elif self.form == "factors in turn":
            y = multiply_in_turn(cast(InTurn, self.decoder), self.code(), x)
            y = y if self.part.scale == 1.0 else y * self.part.scale
        else:
            dense = self()
            return (
                (x @ dense if bias is None else x @ dense + bias) if self.part.transposed else F.linear(x, dense, bias)
            )
        return y if bias is None else y + bias

    def rows_pay(self, places: Tensor, index: int = 0) -> bool:
        """Whether single rows are decoded.

        Args:
            places: Row indices.
            index: Not used.

        Returns:
            True where the matrix lies in a product of two factors.
        """
        return self.form == "single rows"

    def rows(self, places: Int[Tensor, "*batch"], index: int = 0) -> Float[Tensor, "*batch cols"]:
        """Decode single rows.

        Args:
            places: Row indices, of any shape.
            index: Not used.

        Returns:
            One row for each index; padding rows are 0.
        """
        sizes, floats = self.sizes, self.code()
        start = self.start + places.long() * sizes.cols
        blocks = (sizes.cols + sizes.n - 2) // sizes.n + 1
        first = torch.div(start, sizes.n, rounding_mode="floor")
        touched = (first[..., None] + torch.arange(blocks)).clamp(max=floats["xf"].shape[0] - 1)
        entries = (F.embedding(touched, floats["xf"]) @ floats["wf"]).flatten(-2)
        made = entries.gather(-1, (start - first * sizes.n)[..., None] + torch.arange(sizes.cols)) * self.part.scale
        zero_row = self.part.zero_row
        return made if zero_row is None else made * (places != zero_row)[..., None]

    def sizes_of_results(self) -> set[int]:
        """Numbers of entries of what a runtime may compute from the constants when it loads them.

        Returns:
            Those of the windows and of the banded matrix.
        """
        if self.form != "structured":
            return set()
        sizes = self.sizes
        return {sizes.read, 2 * sizes.n**2 * sizes.rank}

    def is_trained(self) -> bool:
        """Whether anything requires a gradient.

        Returns:
            False.
        """
        return False

    def extra_repr(self) -> str:
        """Shape and form, for ``print(model)``.

        Returns:
            Both.
        """
        return f"{'x'.join(map(str, self.part.shape))}, {self.form}"

    def _hold_windows(self, weight: ThinWeight) -> bool:
        """Store windows in place of ``xf``: floats, or symbols whose values do not depend on their places."""
        floats = {entry: value.detach() for entry, value in weight.floats().items()}
        windows, inner = self._windows_of(floats["xf"]), stored_by(weight.method, "xf")
        if inner is None:
            self.register_buffer("windows", windows.contiguous())
        else:
            code = {
                entry.removeprefix("xf_"): value for entry, value in weight.code().items() if entry.startswith("xf_")
            }
            symbols = code.pop("symbols", None)
            if symbols is None or symbols.numel() != floats["xf"].numel() or inner.derived():
                return False
            shape = floats["xf"].shape
            symbols = self._windows_of(symbols.view(shape)).reshape(windows.shape[0], -1)
            tried = inner.decode({**code, "symbols": symbols}, _TORCH) if _are_tables(code, shape) else symbols[:0]
            if tried.shape != symbols.shape or not torch.equal(tried.view(windows.shape), windows):
                return False
            self.inner, self.symbols, self.tables = inner, PackedIntegers(symbols), list(code)
            for entry, value in code.items():
                self.register_buffer(f"table_{entry}", value.detach().clone())
        wf = floats["wf"]
        if self._by_band() or 4 * wf.shape[0] * _CHANNELS * (wf.shape[1] + _CHANNELS) > _KERNEL:
            self.register_buffer("wf", wf.clone())
        else:  # what a runtime is to convolve with must be a constant
            self.register_buffer("kernel", self._kernel_of(wf).contiguous())
            self.register_buffer("phases", self._phases().int())
        return True

    def _windows(self) -> Float[Tensor, "n depth taps"]:
        """The windows, in whichever form they are stored."""
        if hasattr(self, "windows"):
            return cast(Tensor, self.windows)
        code = {entry: getattr(self, f"table_{entry}") for entry in self.tables} | {"symbols": self.symbols()}
        return cast(Tensor, self.inner.decode(code, _TORCH)).view(self.sizes.n, self.sizes.depth, -1)

    def _windows_of(self, xf: Tensor) -> Float[Tensor, "n depth taps"]:
        """For each phase p and each k, the rows of xf that output ``k n + p`` reads; past the end any rows, times 0."""
        sizes = self.sizes
        count, taps = sizes.stop - sizes.first, sizes.taps
        output = torch.arange(sizes.depth * sizes.n)
        base = torch.div(sizes.offset + output * sizes.cols, sizes.n, rounding_mode="floor")
        reads = (base[:, None] + torch.arange(taps)).clamp(max=count - 1).flatten()
        rows = xf[sizes.first : sizes.stop].index_select(0, reads)
        return rows.reshape(sizes.depth, sizes.n, taps * sizes.rank).transpose(0, 1)

    def operands(self) -> tuple[Tensor, ...]:
        """What a structured product multiplies by; the same for every call, so that a loop computes it once.

        Returns:
            The windows and the banded matrix; the windows, the kernel of the convolution and the phases; or, where n is
            the fan-in, both factors.
        """
        if hasattr(self, "code"):
            floats = self.code()
            if self.is_rank:
                return floats["xf"][self.sizes.first : self.sizes.stop], floats["wf"]
            windows, wf = self._windows_of(floats["xf"]), floats["wf"]
        else:
            windows, wf = self._windows(), cast("Tensor | None", getattr(self, "wf", None))
        if wf is None:
            return windows, cast(Tensor, self.kernel), cast(Tensor, self.phases)
        return (windows, self._band_of(wf)) if self._by_band() else (windows, self._kernel_of(wf), self._phases())

    def multiply(self, x: Float[Tensor, "items cols"], operands: Sequence[Tensor]) -> Float[Tensor, "items rows"]:
        """The structured product (docs/theory.md): a correlation, then n products, one for each phase.

        Args:
            x: Inputs.
            operands: What ``operands`` returned.

        Returns:
            The outputs.
        """
        sizes, windows = self.sizes, operands[0]
        if self.is_rank:
            y = F.linear(F.linear(x, operands[1]), windows)
        else:
            sums = self._banded(x, operands[1]) if len(operands) == 2 else self._convolved(x, *operands[1:])
            y = torch.matmul(windows, sums)  # n x depth x items
            # Whole rows of items move; then one transposition of a matrix, which runtimes cancel against the next one
            y = y.transpose(0, 1).reshape(sizes.depth * sizes.n, -1)[: sizes.rows].t()
        return y if self.part.scale == 1.0 else y * self.part.scale

    def _by_band(self) -> bool:
        """Whether the correlation is a product with a banded matrix, which must be small beside the dense weight."""
        sizes = self.sizes
        return self.stage == "band" and 2 * sizes.n**2 * sizes.rank <= _BAND * sizes.rows * sizes.cols

    def _phases(self) -> Int[Tensor, " n"]:
        """For each phase of the outputs, which of n neighbouring entries of the correlation they read."""
        sizes = self.sizes
        return sizes.n - 1 - torch.remainder(sizes.offset + torch.arange(sizes.n) * sizes.cols, sizes.n)

    def _band_of(self, wf: Tensor) -> Float[Tensor, "n_rank twice_n"]:
        """A matrix whose rows hold wf, one entry further each, in the order of the phases."""
        n, rank = self.sizes.n, self.sizes.rank
        shifted = F.pad(wf, (0, n + 1)).repeat(1, n)[:, : 2 * n * n].reshape(rank, n, 2 * n)
        return shifted.index_select(1, self._phases()).transpose(0, 1).reshape(n * rank, 2 * n)

    def _banded(self, x: Tensor, band: Tensor) -> Float[Tensor, "n terms items"]:
        """The banded matrix times columns of 2 n inputs: those of two neighbouring blocks."""
        n, rank, taps = self.sizes.n, self.sizes.rank, self.sizes.taps
        padded = F.pad(x, (n - 1, (taps + 1) * n - (n - 1) - self.sizes.cols))
        blocks = padded.t().reshape(taps + 1, n, -1).transpose(0, 1)  # n x blocks x items
        columns = torch.cat([blocks[:, :-1], blocks[:, 1:]], 0).reshape(2 * n, -1)
        sums = torch.matmul(band, columns)
        if rank > 1:
            sums = sums.reshape(n, rank, taps, -1).transpose(1, 2)
        return sums.reshape(n, taps * rank, -1)

    def _kernel_of(self, wf: Tensor) -> Float[Tensor, "channels 1 long"]:
        """For each row of wf, 16 channels that hold it, one entry further each."""
        long = self.sizes.n + _CHANNELS - 1
        repeated = F.pad(wf, (0, _CHANNELS)).repeat(1, _CHANNELS)[:, : _CHANNELS * long]
        return repeated.reshape(self.sizes.rank * _CHANNELS, 1, long)

    def _convolved(self, x: Tensor, kernel: Tensor, phases: Tensor) -> Float[Tensor, "n terms items"]:
        """A convolution of stride 16."""
        n, rank, taps, each = self.sizes.n, self.sizes.rank, self.sizes.taps, _CHANNELS
        places, front = -(-taps * n // each), n - 1
        whole = (places - 1) * each + kernel.shape[2]
        sums = F.conv1d(F.pad(x, (front, whole - front - self.sizes.cols))[:, None], kernel, stride=each)
        sums = sums.reshape(-1, rank, each, places).permute(0, 3, 2, 1).reshape(-1, places * each, rank)
        sums = sums[:, : taps * n].reshape(-1, taps, n, rank).index_select(2, phases)
        return sums.permute(2, 1, 3, 0).reshape(n, taps * rank, -1)
