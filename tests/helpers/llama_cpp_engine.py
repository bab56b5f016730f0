"""llama.cpp through the shared library of the package ``xllamacpp``; run as a script, by an environment that has it.

Reads a list of jobs as JSON from stdin and writes the list of results. A job is one of
``{"do": "generate", "model": FILE, "prompts": [[id, ...], ...], "tokens": N}``: greedy ids and the logits after a prompt,
``{"do": "tokenize", "model": FILE, "texts": [...]}``: ids of texts, with BOS and EOS as the file says, and
``{"do": "speed", "models": {NAME: FILE}, "prompt": P, "tokens": N, "rounds": R}``: CPU seconds, the models in turn.
"""

import ctypes
import json
import sys
import time
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int32, c_uint32, c_void_p
from importlib.util import find_spec
from pathlib import Path

F32 = 0


class ModelParams(Structure):
    _fields_ = [("room", ctypes.c_char * 256)]


class ContextParams(Structure):
    """``llama_context_params`` of llama.h, of the release that ``make serve-llama-cpp`` installs."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("unused_counts", c_uint32 * 4),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("unused_kinds", c_int32 * 4),
        ("flash_attn_type", c_int32),
        ("unused_rope", c_float * 6),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("unused_callbacks", c_void_p * 2),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort", c_void_p * 2),
        ("room", ctypes.c_char * 256),
    ]


class Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", c_void_p),
    ]


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)


def library():
    """Returns the functions of llama.h."""
    folder = Path(find_spec("xllamacpp").submodule_search_locations[0])
    found = ctypes.CDLL(str(next(folder.glob("*.so"))))
    for name, result, arguments in (
        ("llama_model_default_params", ModelParams, []),
        ("llama_context_default_params", ContextParams, []),
        ("llama_model_load_from_file", c_void_p, [c_char_p, ModelParams]),
        ("llama_init_from_model", c_void_p, [c_void_p, ContextParams]),
        ("llama_model_get_vocab", c_void_p, [c_void_p]),
        ("llama_vocab_n_tokens", c_int32, [c_void_p]),
        ("llama_batch_get_one", Batch, [POINTER(c_int32), c_int32]),
        ("llama_decode", c_int32, [c_void_p, Batch]),
        ("llama_get_logits_ith", POINTER(c_float), [c_void_p, c_int32]),
        ("llama_get_memory", c_void_p, [c_void_p]),
        ("llama_memory_clear", None, [c_void_p, c_bool]),
        ("llama_tokenize", c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
        ("llama_log_set", None, [LOG, c_void_p]),
        ("llama_free", None, [c_void_p]),
        ("llama_model_free", None, [c_void_p]),
        ("llama_backend_init", None, []),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


class Model:
    """One GGUF file in memory, on one thread; ``exact`` computes attention in float32, else by the defaults."""

    def __init__(self, lib, path, *, length=256, exact=True):
        self.lib = lib
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp does not load " + str(path) + ": " + " ".join(ERRORS[-3:]))
        params = lib.llama_context_default_params()
        if (params.n_batch, params.type_k, params.type_v, params.flash_attn_type) != (2048, 1, 1, -1):
            raise RuntimeError("llama_context_params has another layout: pin the release of xllamacpp")
        params.n_ctx, params.n_threads, params.n_threads_batch = length, 1, 1
        if exact:  # flash attention rounds to half precision
            params.type_k, params.type_v, params.flash_attn_type = F32, F32, 0
        self.context = lib.llama_init_from_model(self.model, params)
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.size = lib.llama_vocab_n_tokens(self.vocab)

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def step(self, ids):
        """Returns the logits after ``ids``."""
        array = (c_int32 * len(ids))(*ids)
        if self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")
        return self.lib.llama_get_logits_ith(self.context, -1)

    def generate(self, prompt, count):
        self.clear()
        logits, found = self.step(prompt)[: self.size], []
        first = list(logits)
        for _ in range(count):
            found.append(max(range(self.size), key=logits.__getitem__))
            logits = self.step(found[-1:])[: self.size]
        return {"tokens": found, "logits": first}

    def tokenize(self, text):
        room, data = (c_int32 * (len(text.encode()) + 8))(), text.encode()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), room, len(room), True, True)
        return list(room[:count])

    def close(self):
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


ERRORS = []


def speed(lib, job):
    """Returns name -> CPU seconds of a prompt and of single tokens, one entry a round; the models take turns."""
    prompt = [10 + 7 * index % 500 for index in range(job["prompt"])]
    length = job["prompt"] + job["tokens"] + 8
    models = {name: Model(lib, path, length=length, exact=False) for name, path in job["models"].items()}
    found = {name: {"prompt": [], "tokens": []} for name in models}
    for turn in range(job["rounds"] + 1):
        for name, model in models.items():
            model.clear()
            start = time.process_time()
            model.step(prompt)
            middle = time.process_time()
            for index in range(job["tokens"]):
                model.step([20 + index])
            end = time.process_time()
            if turn:  # the first round warms up
                found[name]["prompt"].append(middle - start)
                found[name]["tokens"].append(end - middle)
    return found


def main():
    lib = library()
    keep = LOG(lambda level, text, _: ERRORS.append(text.decode(errors="replace").strip()) if level >= 4 else None)
    lib.llama_log_set(keep, None)
    lib.llama_backend_init()
    results = []
    for job in json.load(sys.stdin):
        if job["do"] == "speed":
            results.append(speed(lib, job))
            continue
        try:
            model = Model(lib, job["model"])
        except RuntimeError as error:
            results.append({"error": str(error)})
            continue
        if job["do"] == "tokenize":
            results.append([model.tokenize(text) for text in job["texts"]])
        else:
            results.append([model.generate(prompt, job["tokens"]) for prompt in job["prompts"]])
        model.close()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
