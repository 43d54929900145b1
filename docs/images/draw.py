"""Draw the pictures of the documentation: `python docs/images/draw.py` writes rooms.svg and layout.svg beside it."""

from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent
STYLE = """
  .page { fill: #ffffff; stroke: #d0d7de }
  text { font: 14px system-ui, sans-serif; fill: #1f2328 }
  .small { font-size: 12px; fill: #59636e }
  .code { font-family: ui-monospace, monospace; font-size: 13px }
  .box { fill: #f6f8fa; stroke: #8c959f }
  .travels { fill: #ddf4ff; stroke: #54aeff }
  .context { fill: #54aeff } .blank { fill: #fb8f44 } .hidden { fill: #eaeef2 }
  .arrow { stroke: #8c959f; stroke-width: 1.5; fill: none; marker-end: url(#head) }
  .head { fill: #8c959f }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d }
    text { fill: #f0f6fc } .small { fill: #9198a1 }
    .box { fill: #151b23; stroke: #656c76 } .travels { fill: #0c2d6b; stroke: #388bfd }
    .context { fill: #388bfd } .blank { fill: #db6d28 } .hidden { fill: #212830 }
    .arrow { stroke: #9198a1 } .head { fill: #9198a1 }
  }
"""
ROOMS = (
    (("cli", "one module per group of commands"),),
    (
        ("serving", "OpenAI-compatible server"),
        ("evaluation", "tasks, scores, reports"),
        ("planning", "devices, memory, runs"),
        ("onnx", "graph, export, runtime"),
    ),
    (
        ("training", "arguments, trainers, schedules"),
        ("training/data", "corpora to batches"),
        ("training/pipeline", "stages, ranks, checkpoints"),
    ),
    (
        ("conversion", "one file per command"),
        ("conversion/formats", "SAT, safetensors"),
        ("conversion/streaming", "blocks, resumable runs"),
    ),
    (("quantization", "INT4 and INT8: configuration, layers, kernels, quantizer"),),
    (("hub", "export with its code"), ("pipelines", "fill-mask, text-generation")),
    (("decoding", "slots, steps, sampling: many requests at once"),),
    (("folders", "atomic folder, model folder"), ("sharding", "shard rules, degrees")),
    (("*_glm.py", "configuration, model, masks, layout, generation, tokenizer: what travels to the Hub"),),
)
IDS = ("The", "capital", "of", "France", "is", "[MASK]", ".", "</s>", "sop", "Paris", "eop")
POSITIONS = (0, 1, 2, 3, 4, 5, 6, 7, 5, 5, 5)
CONTEXT_LENGTH = 8


def page(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return an SVG file with a panel of its own, readable on a light and on a dark page."""
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path class="head" d="M0 0 8 4 0 8z"/></marker></defs>',
            f'<rect class="page" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
            *parts,
            "</svg>\n",
        )
    )


def text(x: float, y: float, content: object, style: str = "", anchor: str = "middle") -> str:
    """Return a line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{style}" text-anchor="{anchor}">{escape(str(content))}</text>'


def draw_rooms() -> str:
    """Return the rooms, one row a level, whose imports point downwards."""
    width, row_height, gap = 820, 52, 22
    parts = []
    for level, rooms in enumerate(ROOMS):
        y = 20 + level * (row_height + gap)
        room_width = (width - 40 - 16 * (len(rooms) - 1)) / len(rooms)
        for place, (name, content) in enumerate(rooms):
            x = 20 + place * (room_width + 16)
            style = "travels" if level == len(ROOMS) - 1 else "box"
            parts.append(
                f'<rect class="{style}" x="{x:g}" y="{y}" width="{room_width:g}" height="{row_height}" rx="6"/>'
            )
            parts.append(text(x + room_width / 2, y + 22, name, "code"))
            parts.append(text(x + room_width / 2, y + 41, content, "small"))
        if level < len(ROOMS) - 1:
            parts.append(f'<path class="arrow" d="M{width / 2:g} {y + row_height + 2} v{gap - 4}"/>')
    height = 20 + len(ROOMS) * (row_height + gap)
    return page(width, height, "Rooms of glm_hf; imports point downwards", parts)


def draw_layout() -> str:
    """Return ids and positions of a sample, and which token sees which."""
    cell, left, top = 26, 150, 96
    step = 58
    parts = [text(20, 36, "input_ids", "code", "start"), text(20, 62, "position_ids", "code", "start")]
    for column, (token, position) in enumerate(zip(IDS, POSITIONS, strict=True)):
        x = left + column * step
        style = "context" if column < CONTEXT_LENGTH else "blank"
        parts.append(text(x, 36, token, "code"))
        parts.append(text(x, 62, position, "code"))
        parts.append(f'<rect class="{style}" x="{x - step / 2 + 3:g}" y="72" width="{step - 6}" height="5" rx="2"/>')
    grid_left = left + 150
    for row in range(len(IDS)):
        y = top + 26 + row * cell
        parts.append(text(grid_left - 14, y + 17, IDS[row], "code", "end"))
        for column in range(len(IDS)):
            sees = (row < CONTEXT_LENGTH and column < CONTEXT_LENGTH) or column <= row
            style = "hidden" if not sees else "context" if column < CONTEXT_LENGTH else "blank"
            parts.append(
                f'<rect class="{style}" x="{grid_left + column * cell}" y="{y}" width="{cell - 3}" '
                f'height="{cell - 3}" rx="3"/>'
            )
    x, y = grid_left + len(IDS) * cell + 24, top + 60
    for style, line in (
        ("context", "context: read in both directions"),
        ("blank", "blank: written from left to right"),
        ("hidden", "not seen"),
    ):
        parts.append(f'<rect class="{style}" x="{x}" y="{y}" width="16" height="16" rx="3"/>')
        parts.append(text(x + 24, y + 13, line, "small", "start"))
        y += 28
    parts.append(text(x, y + 24, "Rows see columns.", "small", "start"))
    parts.append(text(x, y + 44, "Behind [gMASK] positions", "small", "start"))
    parts.append(text(x, y + 62, "count on: 8, 9, 10.", "small", "start"))
    return page(880, top + 26 + len(IDS) * cell + 20, "The infilling layout", parts)


if __name__ == "__main__":
    for name, draw in {"rooms": draw_rooms, "layout": draw_layout}.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
