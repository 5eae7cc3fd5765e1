"""Make inputs for a family, seeded."""

import numpy as np

from zoo.families import family


def feeds(name: str, batch: int = 2, seq: int = 7, *, padded: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Return numpy feeds by input name.

    name: family.
    batch, seq: sizes of the dynamic axes; a decoder's own sequence is `seq - 2`, audio has `40 * seq` samples.
    padded: end every second row's attention mask two positions early (right padding).
    seed: of the ids and floats.

    >>> {name: array.shape for name, array in feeds("gpt2", 2, 7).items()}
    {'input_ids': (2, 7), 'attention_mask': (2, 7)}
    """
    random = np.random.default_rng(seed)
    sizes = {"batch": batch, "sequence": seq, "decoder_sequence": seq - 2, "samples": 40 * seq}
    result = {}
    for key, given in family(name).inputs.items():
        shape = tuple(sizes.get(size, size) for size in given.shape)
        if given.kind == "ids":
            result[key] = random.integers(2, given.below, shape, dtype=np.int64)
        elif given.kind == "mask":
            result[key] = np.ones(shape, np.int64)
            if padded:
                result[key][1::2, -2:] = 0
        else:
            result[key] = random.standard_normal(shape).astype(np.float32)
    return result
