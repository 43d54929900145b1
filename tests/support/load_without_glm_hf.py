"""Load an exported folder where glm_hf cannot be imported, and save what was found as results.pt."""

import re
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline


class NoGLM:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "glm_hf":
            raise ModuleNotFoundError("No module named 'glm_hf'", name="glm_hf")


sys.meta_path.insert(0, NoGLM())

folder, text = sys.argv[1:]
inputs = torch.load("inputs.pt")
results = {"refused": []}
for auto in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"):
    try:
        getattr(transformers, auto).from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        results["refused"].append((auto, "trust_remote_code=True" in str(error)))
trust = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **trust)
results["classes"] = {"AutoConfig": (type(config).__module__, type(config).__name__)}
results["outputs"] = {}
for auto in [name for name in config.auto_map if name != "AutoConfig" and hasattr(transformers, name)]:
    model = getattr(transformers, auto).from_pretrained(folder, **trust).eval()
    results["classes"][auto] = (type(model).__module__, type(model).__name__)
    with torch.no_grad():
        results["outputs"][auto] = model(inputs["input_ids"])[0]
tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
results["classes"]["AutoTokenizer"] = (type(tokenizer).__module__, type(tokenizer).__name__)
results["ids"] = tokenizer(text)["input_ids"]
chat = [{"role": "user", "content": text}]
results["chat"] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
results["special"] = [tokenizer.mask_token_id, tokenizer.sop_token_id, tokenizer.padding_side]
results["fill-mask"] = [
    (guess["token"], guess["score"]) for guess in pipeline("fill-mask", folder, trust_remote_code=True)(text, top_k=3)
]

model = AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
results["generated"] = model.generate(inputs["input_ids"], max_new_tokens=4)
results["sequences"] = model.fill_blanks(inputs["with_masks"]).sequences
model.save_pretrained("again")
tokenizer.save_pretrained("again")
again = AutoModelForCausalLM.from_pretrained("again", **trust).eval()
masked = AutoModelForMaskedLM.from_pretrained("again", **trust).eval()
with torch.no_grad():
    results["again"] = {"AutoModelForCausalLM": again(inputs["input_ids"])[0]}
    results["again"]["AutoModelForMaskedLM"] = masked(inputs["input_ids"])[0]
results["ids again"] = AutoTokenizer.from_pretrained("again", **trust)(text)["input_ids"]
from_hub = AutoModelForCausalLM.from_pretrained("me/glm-tiny", **trust).eval()
results["classes from Hub"] = type(from_hub).__module__
with torch.no_grad():
    results["from Hub"] = from_hub(inputs["input_ids"])[0]
results["ids from Hub"] = AutoTokenizer.from_pretrained("me/glm-tiny", **trust)(text)["input_ids"]

[usage] = re.findall("```python\n(.*?)```", Path(folder, "README.md").read_text(), flags=re.DOTALL)
exec(usage)
results["modules"] = sorted(name for name in sys.modules if name.startswith("glm_hf"))
torch.save(results, "results.pt")
