"""A row of the key table: one parameter, and the published tensor that holds it.

A row moves numbers in both directions: `read` makes the parameter from the tensor, `write` the
tensor from the parameter. Both sides name their dimensions with letters, as einsum does.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

ParamPath = tuple[str, ...]
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A parameter and its tensor.

    Attributes:
      path: of the parameter in the tree; under pre_buffer and post_llm, of one layer's part of it.
      key: the tensor's name; {layer} stands for the layer's number, counted through both stacks.
      tensor, ours: the dimensions on each side, such as "(n h) d" and "d n h". A group in
        parentheses is one dimension of the array, with its first letter outermost.
      sizes: of every letter, in the tensor.
      channel: the letter whose entries are reordered, or chosen; "" if there is none.
      channels: the tensor's entries of that letter, in the parameter's order.
    """

    path: ParamPath
    key: str
    tensor: str
    ours: str
    sizes: Mapping[str, int]
    channel: str = ""
    channels: np.ndarray | None = None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return tuple(_size(group, self.sizes) for group in _groups(self.tensor))

    @property
    def our_rank(self) -> int:
        """The number of dimensions of the parameter, of one layer."""
        return len(_groups(self.ours))

    @property
    def is_layered(self) -> bool:
        return "{layer}" in self.key

    def read(self, get: Callable[[Index], np.ndarray], index: Index, out: np.ndarray) -> None:
        """Fills `out` with the part `index` of the parameter (of one layer).

        An example: H and W key weights of 2 heads (k) with 4 channels (h), from 2 inputs (d). The
        tensor has shape [8, 2]: heads and channels are flattened, channels are in the order
        H1 H2 W1 W2. The parameter has shape [2, 2, 4], channels in the order H1 W1 H2 W2.

        >>> sizes, channels = {"k": 2, "h": 4, "d": 2}, np.array([0, 2, 1, 3])
        >>> row = Row(("k_hw_dkh",), "k_proj_hw.weight", "(k h) d", "d k h", sizes, "h", channels)
        >>> tensor = np.array([[0, 100], [1, 101], [2, 102], [3, 103],  # head 0: H1 H2 W1 W2
        ...                    [4, 104], [5, 105], [6, 106], [7, 107]])  # head 1
        >>> out = np.empty((2, 2, 4), int)
        >>> row.read(tensor.__getitem__, np.index_exp[:, :, :], out)
        >>> out[0]  # of input 0, both heads: H1 W1 H2 W2
        array([[0, 2, 1, 3],
               [4, 6, 5, 7]])
        >>> out[1]
        array([[100, 102, 101, 103],
               [104, 106, 105, 107]])

        Args:
          get: reads a part of the tensor; asked only for the rows and columns that `index` needs.
          index: a slice for every dimension of the parameter; a group is never cut.
          out: of the part's shape.
        """
        ours, theirs = _letters(self.ours), _letters(self.tensor)
        wanted = {letter: (0, self.sizes[letter]) for letter in theirs}  # [start, stop) of each
        for group, part in zip(_groups(self.ours), index, strict=True):
            size = self._our_size(group)
            if len(group) == 1:
                wanted[group] = part.indices(size)[:2]
            elif part.indices(size)[:2] != (0, size):
                raise ValueError(f"{self.key}: dimensions {group!r} cannot be split")
        # The tensor is cut along the first letters of its groups; other letters after reading.
        outer = {group[0] for group in _groups(self.tensor)} - {self.channel}
        boxes = []
        for group in _groups(self.tensor):
            start, stop = wanted[group[0]] if group[0] in outer else (0, self.sizes[group[0]])
            block = _size(group[1:], self.sizes)
            boxes.append(slice(start * block, stop * block))
        counts = {**self.sizes, **{a: wanted[a][1] - wanted[a][0] for a in outer}}
        array = get(tuple(boxes)).reshape([counts[letter] for letter in theirs])
        for axis, letter in enumerate(theirs):
            if letter == self.channel:
                array = np.take(array, self.channels[slice(*wanted[letter])], axis=axis)
            elif letter not in outer:
                array = array[(slice(None),) * axis + (slice(*wanted[letter]),)]
        array = array.transpose([theirs.index(letter) for letter in ours])
        _copy(out.reshape(array.shape), array)

    def write(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Fills `tensor`, or this row's channels of it, from the parameter `leaf` of one layer."""
        ours, theirs = _letters(self.ours), _letters(self.tensor)
        source = leaf.reshape([self._our_size(letter) for letter in ours])
        source = source.transpose([ours.index(letter) for letter in theirs])
        target = tensor.reshape([self.sizes[letter] for letter in theirs])
        if self.channel:
            target[(slice(None),) * theirs.index(self.channel) + (self.channels,)] = source
        else:
            _copy(target, source)

    def _our_size(self, letters: str) -> int:
        if self.channel and letters == self.channel:
            return len(self.channels)
        return _size(letters, self.sizes)


def _groups(pattern: str) -> list[str]:
    """ "(n h) d" -> ["nh", "d"]."""
    return [group.strip("()").replace(" ", "") for group in re.findall(r"\([^)]*\)|\w", pattern)]


def _letters(pattern: str) -> str:
    """ "(n h) d" -> "nhd"."""
    return "".join(_groups(pattern))


def _size(letters: str, sizes: Mapping[str, int]) -> int:
    return int(np.prod([sizes[letter] for letter in letters], dtype=np.int64))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, fast for transposed 16-bit floats.

    numpy copies bfloat16 element by element but 16-bit integers in runs, and transposes several
    times faster a few columns at a time.
    """
    if source.dtype == target.dtype and source.dtype.itemsize == 2:
        source, target = source.view(np.uint16), target.view(np.uint16)
    if source.flags.c_contiguous or source.ndim < 2:
        target[...] = source
        return
    for first in range(0, source.shape[-1], 32):
        target[..., first : first + 32] = source[..., first : first + 32]
