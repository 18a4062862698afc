"""The few lengths that programs are compiled for.

A length is padded to the next of 128, 192, 256, 384, 512, 768, ...: powers of two and the middles
between them. At most a third of a bucket is padding, and all prompts up to 40960 tokens need 18
lengths. A prompt with pictures has room for 4 patches per token, which always suffices because a
visual token is 4 patches and embedding an unused patch costs next to nothing; a prompt without
has room for none. So an image of another size compiles nothing new unless the prompt's bucket is.
"""

SMALLEST = 128


def bucket(length: int) -> int:
    """The smallest length in use that holds `length` tokens."""
    size = SMALLEST
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def patch_bucket(token_bucket: int, num_patches: int) -> int:
    """Room for patches in a batch of `token_bucket` tokens per row."""
    return 4 * token_bucket if num_patches else 0
