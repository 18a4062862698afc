"""Positions: T, H and W of every token, row and column of every patch."""

import numpy as np

from neo_jax.errors import InputError


def thw_positions(
    token_ids: np.ndarray, grid_hw: np.ndarray, image_start_id: int, image_context_id: int
) -> np.ndarray:
    """[L, 3] int32: the positions of one document's tokens on the T, H and W axes.

    T counts tokens, but all visual tokens of an image share one T. H and W are the row and column
    in the image's grid of 32 x 32 pixels; text tokens have 0.

        token   a  <img>  i  i  i  i  </img>  b      (an image of 2 x 2 visual tokens)
        T       0    1    2  2  2  2    3     4
        H       0    0    0  0  1  1    0     0
        W       0    0    0  1  0  1    0     0

    Args:
      token_ids: [L] int.
      grid_hw: [n, 2] patch grids of the n images, in order.
      image_start_id, image_context_id: of <img> and <IMG_CONTEXT>.

    Raises:
      InputError: if visual tokens and grids do not match, or a run of visual tokens does not
        follow <img>.
    """
    token_ids, grid_hw = np.asarray(token_ids), np.asarray(grid_hw).reshape(-1, 2)
    if (grid_hw % 2).any() or (grid_hw < 2).any():
        raise InputError(f"grid_hw {grid_hw.tolist()}: sides must be even, 2 or more")
    is_image = token_ids == image_context_id
    after_start = np.zeros_like(is_image)
    after_start[1:] = token_ids[:-1] == image_start_id
    first = is_image & np.concatenate([[True], ~is_image])[:-1]
    if (first & ~after_start).any():
        place = int(np.argmax(first & ~after_start))
        raise InputError(f"token {place} is <IMG_CONTEXT> but no <img> is before it")
    last = is_image & np.concatenate([~is_image, [True]])[1:]
    found = (np.flatnonzero(last) - np.flatnonzero(first) + 1).tolist()
    wanted = (grid_hw // 2).prod(axis=1).tolist()
    if found != wanted:
        raise InputError(
            f"the tokens have images of {found} visual tokens, the images given have {wanted}"
        )
    thw = np.zeros((len(token_ids), 3), np.int32)
    # As the official code: T also jumps by 2 after a literal <img> in text.
    thw[:, 0] = np.cumsum(~is_image + after_start.astype(np.int32)) - 1
    if len(grid_hw):
        places = [np.indices(hw // 2).reshape(2, -1).T for hw in grid_hw]
        thw[is_image, 1:] = np.concatenate(places)
    return thw


def block_order(grid_hw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order that puts the four patches of a visual token side by side, as a 2 x 2 block.

    Args:
      grid_hw: [n, 2] patch grids of n images whose row-major patches are concatenated.

    Returns:
      order [P] int: `patches[order]` is in block order; and hw [P, 2] int32, the row and column of
      each of these patches in its image's patch grid.
    """
    order, places, first = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int32)], 0
    for rows, columns in np.asarray(grid_hw).reshape(-1, 2):
        index = np.arange(rows * columns).reshape(rows // 2, 2, columns // 2, 2)
        index = index.swapaxes(1, 2).reshape(-1)
        order.append(first + index)
        places.append(np.stack(np.divmod(index, columns), axis=1).astype(np.int32))
        first += rows * columns
    return np.concatenate(order), np.concatenate(places)
