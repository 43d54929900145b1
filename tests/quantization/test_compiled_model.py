import pytest
import torch

from glm_hf import GLMConfig, GLMForBlankInfilling, GLMQuantizationConfig

SPECIAL = ("eos", "mask", "gmask", "smask", "eod", "sop", "eop")


@pytest.mark.parametrize("bits", [8, 4])
def test_compiled_quantized_model_is_one_graph_and_gives_the_same(tmp_path, bits):
    torch.manual_seed(0)
    special = {f"{name}_token_id": 50 + index for index, name in enumerate(SPECIAL)}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    GLMForBlankInfilling(GLMConfig(vocab_size=64, **sizes, **special)).save_pretrained(tmp_path)
    model = GLMForBlankInfilling.from_pretrained(tmp_path, quantization_config=GLMQuantizationConfig(bits=bits)).eval()
    config = model.config
    input_ids = torch.tensor([[5, 6, 7, config.gmask_token_id, config.sop_token_id, 8, 9]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids).logits, model(input_ids).logits, rtol=1e-5, atol=1e-5)
