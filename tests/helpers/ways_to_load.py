"""A program that loads an adapter in every way without importing sparse_peft; each way has a process of its own.

Arguments: the base's folder, the adapter's, and that of an adapter whose file has tensors of the base. Prints
``{way: logits, a name or an error}`` as JSON.
"""

import json
import os
import sys
import traceback

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PeftType, get_peft_config
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, pipeline

BASE, ADAPTER, DAMAGED = sys.argv[1:]
TOKENS = torch.arange(8)[None] % 40


def base():
    return AutoModelForCausalLM.from_pretrained(BASE)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits.flatten()[:50].tolist()


def load_adapter():
    model = base()
    model.load_adapter(ADAPTER)
    return model


def refused(model, load):
    """State of a model after a refused load."""
    before = logits(model)
    try:
        load(model, DAMAGED)
    except ValueError as error:
        wrapped = any(isinstance(module, BaseTunerLayer) for module in model.modules())
        return {"error": str(error), "wrapped": wrapped, "same": logits(model) == before}
    return "not refused"


WAYS = {
    "PeftConfig": lambda: type(PeftConfig.from_pretrained(ADAPTER)).__name__,
    "get_peft_config": lambda: type(get_peft_config({"peft_type": "SPARSE_PEFT_DELTA"})).__name__,
    "PeftType": lambda: PeftType("SPARSE_PEFT_DELTA").name,
    "PeftModel": lambda: logits(PeftModel.from_pretrained(base(), ADAPTER)),
    "AutoPeftModel": lambda: logits(AutoPeftModelForCausalLM.from_pretrained(ADAPTER)),
    "AutoModel": lambda: logits(AutoModelForCausalLM.from_pretrained(ADAPTER)),
    "load_adapter": lambda: logits(load_adapter()),
    "pipeline": lambda: logits(pipeline("text-generation", model=ADAPTER, tokenizer=BASE).model),
    "refused by PeftModel": lambda: refused(base(), PeftModel.from_pretrained),
    "refused by transformers": lambda: refused(base(), lambda model, folder: model.load_adapter(folder)),
}


def answer(way):
    """The way's result, from a process of its own."""
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            assert "sparse_peft" not in sys.modules
            result = WAYS[way]()
        except BaseException:
            result = traceback.format_exc()
        with os.fdopen(write, "w") as file:
            json.dump(result, file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        return json.load(file)


if __name__ == "__main__":
    print(json.dumps({way: answer(way) for way in WAYS}))
