"""The same weights for every peer: a folder for transformers, and GGUF files with tensors of other types."""

import hashlib
import shutil
from pathlib import Path

import gguf

from sinkattn.hf.load import load

FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


class Weights:
    """A GGUF file, and what is made of it, once, in a cache folder.

    Args:
        source: the GGUF file.
        cache: folder for what is made of it.
    """

    def __init__(self, source: Path, cache: Path) -> None:
        self.source = source
        with source.open("rb") as file:
            digest = hashlib.sha256(file.read())
        self._cache = cache / "weights" / digest.hexdigest()[:12]
        self._cache.mkdir(parents=True, exist_ok=True)

    def path(self, kind: str) -> Path:
        """The weights as "folder", "given" or a GGUF of another type; see `peers.Peer`."""
        if kind == "given":
            return self.source
        target = self._cache / ("folder" if kind == "folder" else f"{kind}.gguf")
        if not target.exists():
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            if kind == "folder":
                self._write_folder(partial)
            else:
                self._write_gguf(partial, kind)
            partial.rename(target)
        return target

    def bits(self) -> int:
        """Bits of a weight in the GGUF file, rounded down to 32, 16, 8 or 4."""
        tensors = [tensor for tensor in gguf.GGUFReader(self.source).tensors if len(tensor.shape) > 1]
        mean = 8 * sum(int(tensor.n_bytes) for tensor in tensors) / sum(int(tensor.n_elements) for tensor in tensors)
        return max(bits for bits in (4, 8, 16, 32) if bits <= max(4, mean))

    def _write_folder(self, target: Path) -> None:
        for part in load(self.source, device="cpu", dtype="float32"):
            part.save_pretrained(target)

    def _write_gguf(self, target: Path, kind: str) -> None:
        reader = gguf.GGUFReader(self.source)
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        writer = gguf.GGUFWriter(target, fields.pop("general.architecture").contents())
        for name, field in fields.items():
            if name == "general.file_type":
                writer.add_file_type(FILE_TYPES[kind])
            else:
                item_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], sub_type=item_type)
        wanted = gguf.GGMLQuantizationType[kind]
        for tensor in reader.tensors:
            # Norms stay in float32, as in files that llama.cpp writes.
            if len(tensor.shape) == 1:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            else:
                values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
