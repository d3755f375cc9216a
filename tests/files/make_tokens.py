"""Writes token files as nanoGPT's and llm.c's scripts lay them out: python make_tokens.py (numpy 2)

nanoGPT, data/*/prepare.py: tokens as uint16, nothing else. llm.c, dev/data/data_common.py: 256 int32, of which the first
three are magic, version and count, then the tokens, as uint16 for GPT-2 and as uint32 for Llama 3.
"""

import pathlib

import numpy

FOLDER = pathlib.Path(__file__).parent / "tokens"
GPT2 = [50256, 464, 3797, 3332, 319, 262, 2603, 13, 50256, 0, 65535]
LLAMA3 = [128000, 791, 8415, 7731, 389, 279, 5634, 13, 0, 70000]


def llmc(magic, version, tokens):
    header = numpy.zeros(256, dtype=numpy.int32)
    header[:3] = magic, version, len(tokens)
    return header.tobytes() + tokens.tobytes()


FOLDER.mkdir(exist_ok=True)
(FOLDER / "nano.bin").write_bytes(numpy.array(GPT2, dtype=numpy.uint16).tobytes())
(FOLDER / "gpt2.bin").write_bytes(llmc(20240520, 1, numpy.array(GPT2, dtype=numpy.uint16)))
(FOLDER / "llama3.bin").write_bytes(llmc(20240801, 7, numpy.array(LLAMA3, dtype=numpy.uint32)))
