"""An exported folder: complete or absent. What can be refused is refused before the first byte is written."""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp4.interop.export.parts import READABLE, FileTensor, PartsWriter, writing_parts
from megatron_fp4.interop.export.plan import CodedLinear, ExportedTensor
from megatron_fp4.interop.export.quantized import (
    ExportFormat,
    coded_file_tensors,
    coded_names,
    coded_rows,
    global_scale,
    input_name,
)
from megatron_fp4.interop.export.weights import Masters, QuantizationErrors, quantized_rows
from megatron_fp4.storage.durable import MANIFEST, fsync_directory
from megatron_fp4.storage.local import check_room
from megatron_fp4.storage.owner import Owner

ALWAYS_FP32 = (".A_log", ".dt_bias", ".D", ".e_score_correction_bias")
"""Ends of the names that stay FP32 in a file of another type, as in training: three numbers a head of Mamba-2, and one
an expert of a mixture."""
INPUT_DIVISOR = 6.0 * 448.0
"""Largest code times largest block scale of an activation, which servers quantize without four over six."""
OF_A_RUN = (MANIFEST, "state.json", "config.yaml")
"""Files of a checkpoint and of a run, whose folders --force does not remove."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Export:
    """What goes into a folder.

    dtype: of the tensors that are no codes, but for those that are always FP32. compute_dtype: in which the codes'
    weights were quantized in training. files: everything else, by name. errors: filled on the way where it is given.
    inputs: the largest magnitude of every coded linear's input, where its scale is written too.
    """

    form: ExportFormat
    tensors: Sequence[ExportedTensor]
    masters: Masters
    dtype: torch.dtype
    compute_dtype: torch.dtype
    files: Mapping[str, bytes]
    part_bytes: int
    errors: QuantizationErrors | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    _amax: dict[str, Tensor] = field(default_factory=dict)

    def file_tensors(self) -> Iterator[FileTensor]:
        """Every tensor of the files."""
        for one in self.tensors:
            if one.zeros:
                yield FileTensor(one.joined.name, torch.float32, (one.zeros,))
                continue
            shapes = [self.masters.shapes[part] for part in one.joined.parts]
            rows, columns = sum(shape[0] for shape in shapes), shapes[0][1:]
            if one.coded is not None:
                yield from coded_file_tensors(self.form, one.module, rows, columns[0])
                if self.inputs:
                    yield self._input_tensor(one.module)
                continue
            channel = (1,) if one.joined.channel_dim else ()
            dtype = torch.float32 if one.joined.name.endswith(ALWAYS_FP32) else self.dtype
            yield FileTensor(one.joined.name, dtype, (rows, *channel, *columns))

    def _input_tensor(self, module: str) -> FileTensor:
        shape = () if self.form is ExportFormat.modelopt else (1,)
        return FileTensor(f"{module}.{input_name(self.form)}", torch.float32, shape)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.file_tensors())

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(self.masters.shapes[part]).numel() for one in self.tensors for part in one.joined.parts)

    @property
    def coded_linears(self) -> list[CodedLinear]:
        return list(dict.fromkeys(one.coded for one in self.tensors if one.coded is not None))

    def size_text(self) -> str:
        """`12,310,000 parameters in 24.62 MB, 16.00 bits each; the NVFP4 linears 4.50 bits a weight`."""
        bits = 8 * self.num_bytes / self.num_parameters
        coded = f"; the NVFP4 linears {self._bits_of_codes():.4g} bits a weight" if self.form.coded else ""
        return f"{self.num_parameters:,} parameters in {self.num_bytes / 1e6:,.2f} MB, {bits:.2f} bits each{coded}"

    def _bits_of_codes(self) -> float:
        """Bits per weight of the linears that are written as codes, scales included."""
        modules = {one.module for one in self.tensors if one.coded is not None}
        names = {f"{module}.{name}" for module in modules for name in coded_names(self.form)}
        bits = sum(8 * tensor.num_bytes for tensor in self.file_tensors() if tensor.name in names)
        parts = [part for linear in self.coded_linears for part in linear.parts]
        return bits / sum(torch.Size(self.masters.shapes[part]).numel() for part in parts)

    def _amax_of(self, linear: CodedLinear) -> Tensor:
        """The largest magnitude of a linear, of all its parts; measured once."""
        if linear.name not in self._amax:
            self._amax[linear.name] = self.masters.amax(linear.parts, self.compute_dtype)
        return self._amax[linear.name]

    def write_weights(self, writer: PartsWriter) -> None:
        """Every tensor, some rows at a time."""
        for one in self.tensors:
            if one.zeros:
                writer.write(one.joined.name, 0, torch.zeros(one.zeros))
            elif one.coded is None:
                self._write_dense(one, writer)
            else:
                self._write_coded(one, one.coded, writer)

    def _write_dense(self, one: ExportedTensor, writer: PartsWriter) -> None:
        dtype = torch.float32 if one.joined.name.endswith(ALWAYS_FP32) else self.dtype
        above = 0
        for part in one.joined.parts:
            for first, rows in self.masters.chunks(part):
                channelled = rows[:, None] if one.joined.channel_dim else rows
                writer.write(one.joined.name, above + first, channelled.to(dtype))
            above += self.masters.shapes[part][0]

    def _write_coded(self, one: ExportedTensor, linear: CodedLinear, writer: PartsWriter) -> None:
        amax = self._amax_of(linear)
        divisor = 6.0 * linear.operand.scale_bound
        *_, last = coded_file_tensors(self.form, one.module, 1, 1)
        above = 0
        for part in one.joined.parts:
            for first, masters in self.masters.chunks(part):
                rows = masters.to(self.compute_dtype)
                quantized = quantized_rows(rows, amax, linear.operand)
                for name, values in coded_rows(self.form, one.module, quantized):
                    writer.write(name, above + first, values)
                if self.errors is not None:
                    self.errors.add(linear, rows, amax)
            above += self.masters.shapes[part][0]
        writer.write(last.name, 0, global_scale(self.form, amax, divisor))
        if self.inputs:
            scale = global_scale(self.form, self.inputs[linear.name], INPUT_DIVISOR)
            writer.write(self._input_tensor(one.module).name, 0, scale)


def check_place(to: Path, num_bytes: int, *, force: bool) -> None:
    """Raise ValueError for a folder that holds something, and where the disk is too small.

    force: files may be there, but neither folders nor a run or a checkpoint: those are no exports.
    """
    if to.exists() and not to.is_dir():
        raise ValueError(f"{to} is a file; choose another directory")
    held = sorted(to.iterdir()) if to.is_dir() else []
    if held and not force:
        raise ValueError(f"{to} is not empty; choose another directory, or replace it with --force")
    if kept := [path.name for path in held if path.is_dir() or path.name in OF_A_RUN]:
        raise ValueError(
            f"{to} holds {kept[0]}, so it is no exported model, and --force does not remove it; choose another"
        )
    if blocking := next((path for path in to.absolute().parents if path.exists() and not path.is_dir()), None):
        raise ValueError(f"{blocking} is a file; choose another directory")
    check_room(to, num_bytes)


def write_folder(export: Export, to: Path, *, force: bool, last: tuple[str, Callable[[], bytes]]) -> str:
    """Write everything beside `to`, then give it that name; returns its size in words.

    last: name and content of a file that is made after the weights. Raises ValueError as `check_place` does, and
    OSError.
    """
    to = to.resolve()  # a link stays, and "." has a name
    check_place(to, export.num_bytes, force=force)
    to.parent.mkdir(parents=True, exist_ok=True)
    for left in to.parent.glob(f"{glob.escape(to.name)}.writing-*"):
        owner = Owner.from_tag(left.name.removeprefix(f"{to.name}.writing-"))
        if owner is not None and not owner.lives(0.0, math.inf):
            shutil.rmtree(left, ignore_errors=True)  # of an export that was killed
    temporary = to.with_name(f"{to.name}.writing-{Owner.me().tag}")
    temporary.mkdir()
    try:
        with writing_parts(temporary, export.file_tensors(), export.part_bytes) as writer:
            export.write_weights(writer)
        index = {INDEX: json_bytes(writer.index)} if writer.index else {}
        for name, data in {**export.files, **index, last[0]: last[1]()}.items():
            path = temporary / name
            path.write_bytes(data)
            path.chmod(READABLE)
        fsync_directory(temporary)
        _replace(temporary, to)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(f"{to} was not written: {error}") from error
        raise
    fsync_directory(to.parent)
    return export.size_text()


def _replace(temporary: Path, to: Path) -> None:
    """Give the new folder its name; what had it goes only then."""
    if to.exists() and any(to.iterdir()):
        old = to.with_name(f"{to.name}.replaced-{Owner.me().tag}")
        os.rename(to, old)
        os.rename(temporary, to)
        shutil.rmtree(old)
    else:
        os.rename(temporary, to)


def json_bytes(values: object) -> bytes:
    """A JSON file as people read it."""
    return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()
