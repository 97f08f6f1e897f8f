"""A node for tests alone: makes the vectors of a small text encoder as wide as a model wants them."""

import torch


class WidenConditioning:
    """Repeats each text vector until it has the width, and says that every token counts, as T5's encoders do."""

    CATEGORY = "testing"
    FUNCTION = "widen"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"conditioning": ("CONDITIONING",), "width": ("INT", {"min": 1, "max": 65536})}}

    def widen(self, conditioning: list, width: int) -> tuple[list]:
        widened = []
        for vectors, extras in conditioning:
            repeats = -(-width // vectors.shape[-1])
            mask = torch.ones(vectors.shape[:2], dtype=torch.long)
            wide = torch.cat([vectors] * repeats, dim=-1)[..., :width]
            widened.append([wide, {**extras, "attention_mask": mask}])
        return (widened,)


NODE_CLASS_MAPPINGS = {"WidenConditioning": WidenConditioning}
