"""The end of the demo: a table of held-out accuracy, figures, and an image to ask about."""

import json
from pathlib import Path

from neo_jax.demo.figures import draw_answers, draw_loss
from neo_jax.demo.held_out import ask_held_out, scores
from neo_jax.infer.api import Pipeline


def report(neo: Pipeline, workdir: str, per_kind: int = 100) -> dict[str, dict[str, float]]:
    """Asks held-out questions, prints and returns their scores, and writes files into `workdir`.

    They are `held_out.json` (the scores), `answers.png`, `loss.png` and `example.png`.
    """
    answers = ask_held_out(neo, per_kind)
    table = scores(answers)
    folder = Path(workdir)
    (folder / "held_out.json").write_text(json.dumps(table, indent=2) + "\n")
    draw_answers(answers, folder / "answers.png")
    answers[0].images[0].save(folder / "example.png")
    has_curve = draw_loss(folder)
    print(f"{'held out':10} {'accuracy':>9} {'majority':>9} {'blind':>9} {'questions':>10}")
    for kind, row in table.items():
        numbers = " ".join(f"{row[name]:>9.1%}" for name in ("accuracy", "majority", "blind"))
        print(f"{kind:10} {numbers} {row['questions']:>10}")
    print(f"see {folder / 'answers.png'}" + (f" and {folder / 'loss.png'}" if has_curve else ""))
    return table
