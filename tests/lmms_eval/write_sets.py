"""Writes tiny data sets of scanned digits in the formats of the benchmarks (Parquet, README card).

Run by the Python of lmms-eval's environment, which has ``datasets``: ``python write_sets.py
DIRECTORY DAMAGED``.  The second gets POPE alone, with two rows whose picture cannot be decoded, one
of them the first.  Columns are those of the data sets on the hub that the tasks read, and more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import Image, Value
from datasets import Sequence as List
from set_files import STRING, digit, write


def pope(folder: Path, damaged: Sequence[int] = ()) -> None:
    """Four questions; the rows ``damaged`` have something else than a picture."""
    questions = ["zero", "one", "cat", "dog"]
    rows = [
        {
            "id": str(i),
            "question_id": str(i),
            "question": f"Is there a {what} in the image?",
            "answer": "yes" if i < 2 else "no",
            "image_source": f"digit_{i}",
            "image": {"bytes": b"no picture", "path": None} if i in damaged else digit(i),
            "category": "adversarial",
        }
        for i, what in enumerate(questions)
    ]
    write(folder, rows, "test")


def textvqa(folder: Path) -> None:
    answers = [["stop"] * 10, ["left"] * 2 + ["right"] * 8]
    rows = [
        {
            "image_id": f"digit_{i}",
            "question_id": i,
            "question": f"what is written on sign {i}?",
            "image": digit(i),
            "answers": answers[i],
            "ocr_tokens": [],
            "set_name": "val",
        }
        for i in range(2)
    ]
    write(
        folder,
        rows,
        "validation",
        question_id=Value("int32"),
        answers=List(STRING),
        ocr_tokens=List(STRING),
    )


def chartqa(folder: Path) -> None:
    values = [
        ("human_test", "100"),
        ("human_test", "Blue"),
        ("augmented_test", "40"),
        ("augmented_test", "7"),
    ]
    rows = [
        {"type": kind, "question": f"What is bar {i}?", "answer": answer, "image": digit(i)}
        for i, (kind, answer) in enumerate(values)
    ]
    write(folder, rows, "test")


def docvqa(folder: Path) -> None:
    rows = [
        {
            "questionId": str(100 + i),
            "question": f"What is the name in document {i}?",
            "question_types": ["handwritten"],
            "image": digit(i),
            "docId": i,
            "answers": answers,
            "data_split": "val",
        }
        for i, answers in enumerate([["seven"], ["eight", "8"], ["nine"]])
    ]
    types = {
        "question_types": List(STRING),
        "docId": Value("int32"),
        "answers": List(STRING),
    }
    write(folder, rows, "validation", "DocVQA", **types)
    write(folder, [{**row, "answers": None} for row in rows], "test", "DocVQA", **types)


def ai2d(folder: Path) -> None:
    rows = [
        {
            "question": f"Which digit is label {i}?",
            "options": ["three", "four", "five", "six"],
            "answer": str(i),
            "image": digit(i + 3),
        }
        for i in range(3)
    ]
    write(folder, rows, "test", options=List(STRING))


def mmbench(folder: Path) -> None:
    rows = [
        {
            "index": i,
            "question": f"Which digit is in picture {i}?",
            "hint": "nan",
            "answer": "ABCD"[i],
            "A": "zero",
            "B": "one",
            "C": "two",
            "D": "three",
            "category": "ocr",
            "image": digit(i),
            "source": "digits",
            "L2-category": "finegrained_perception",
            "comment": "nan",
            "split": "dev",
        }
        for i in range(4)
    ]
    write(folder, rows, "dev", "en", index=Value("int64"))
    write(
        folder,
        [{**row, "split": "test", "answer": "nan"} for row in rows],
        "test",
        "en",
        index=Value("int64"),
    )


def scienceqa(folder: Path) -> None:
    rows = [
        {
            "image": digit(i),
            "question": f"What is shown in exercise {i}?",
            "choices": ["a zero", "a one"],
            "answer": i,
            "hint": "",
            "task": "closed choice",
            "subject": "natural science",
            "lecture": "",
            "solution": "",
        }
        for i in range(2)
    ]
    write(folder, rows, "test", "ScienceQA-IMG", choices=List(STRING), answer=Value("int8"))


def mme(folder: Path) -> None:
    rows = [
        {
            "question_id": f"{category}/{n}.png",
            "image": digit(n),
            "question": f"{question} Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        for category, n in (("count", 0), ("count", 1), ("code_reasoning", 2))
        for question, answer in (
            (f"Is {n} shown in {category}?", "Yes"),
            (f"Is {n} absent in {category}?", "No"),
        )
    ]
    write(folder, rows, "test")


def hallusion_bench(folder: Path) -> None:
    rows = [
        {
            "category": category,
            "subcategory": "figure",
            "visual_input": "1",
            "set_id": "0",
            "figure_id": str(i),
            "sample_note": "digits",
            "question_id": str(i),
            "question": f"Is curve {i} a circle?",
            "gt_answer_details": f"Curve {i} is {'' if i == 0 else 'not '}a circle.",
            "gt_answer": "1" if i == 0 else "0",
            "filename": f"{i}.png",
            "image": digit(i),
        }
        for i, category in enumerate(["VD", "VS"])
    ]
    write(folder, rows, "image")


def mmvet(folder: Path) -> None:
    rows = [
        {
            "question_id": f"v1_{i}",
            "image": digit(i),
            "question": f"How much is sum {i}?",
            "answer": f"{i}",
            "image_source": "digits",
            "capability": "ocr,math",
        }
        for i in range(2)
    ]
    write(folder, rows, "test")


def gqa(folder: Path) -> None:
    instructions = [
        {
            "id": str(i),
            "imageId": f"n{i}",
            "question": f"What colour is object {i}?",
            "answer": answer,
            "fullAnswer": f"It is {answer}.",
            "isBalanced": True,
        }
        for i, answer in enumerate(["white", "black"])
    ]
    images = [{"id": f"n{i}", "image": digit(i)} for i in range(2)]
    write(
        folder, instructions, "testdev", "testdev_balanced_instructions", isBalanced=Value("bool")
    )
    write(folder, images, "testdev", "testdev_balanced_images")


def vqav2(folder: Path) -> None:
    given = [["yes"] * 10, ["2"] * 3 + ["two"] * 7]
    rows = [
        {
            "question_type": "what is",
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": n}
                for n, answer in enumerate(answers, start=1)
            ],
            "image_id": i,
            "answer_type": "other",
            "question_id": i,
            "question": f"What is on plate {i}?",
            "image": digit(i),
        }
        for i, answers in enumerate(given)
    ]
    answer = {"answer": STRING, "answer_confidence": STRING, "answer_id": Value("int64")}
    numbers = {"image_id": Value("int64"), "question_id": Value("int64")}
    write(folder, rows, "validation", answers=[answer], **numbers)
    write(folder, [{**row, "answers": None} for row in rows], "test", answers=[answer], **numbers)


def seedbench(folder: Path) -> None:
    rows = [
        {
            "answer": "AB"[i],
            "choice_a": "left",
            "choice_b": "right",
            "choice_c": "above",
            "choice_d": "below",
            "data_id": f"{i}",
            "data_type": "image",
            "question": f"Where is digit {i}?",
            "question_id": str(i),
            "question_type_id": 1,
            "image": [digit(i)],
            "segment": [],
        }
        for i in range(2)
    ]
    write(
        folder,
        rows,
        "test",
        question_type_id=Value("int16"),
        image=List(Image()),
        segment=List(Value("float32")),
    )


def mmmu(folder: Path) -> None:
    rows = [
        {
            "id": f"validation_Math_{i}",
            "question": question,
            "options": str(options),
            "explanation": "",
            "image_1": digit(1),
            "image_2": digit(2) if i == 1 else None,
            **{f"image_{n}": None for n in range(3, 8)},
            "img_type": "['Other']",
            "answer": answer,
            "topic_difficulty": "Easy",
            "question_type": kind,
            "subfield": "Arithmetic",
        }
        for i, (question, options, answer, kind) in enumerate(
            [
                ("Which digit is <image 1>?", ["one", "two"], "A", "multiple-choice"),
                ("Is <image 1> less than <image 2>, sum 1?", ["no", "yes"], "B", "multiple-choice"),
                ("How much is <image 1> and one?", [], "2", "open"),
            ]
        )
    ]
    write(folder, rows, "validation", **{f"image_{n}": Image() for n in range(1, 8)})


def mathvista(folder: Path) -> None:
    metadata = {
        "category": "math-targeted-vqa",
        "context": "synthetic scene",
        "grade": "elementary school",
        "img_height": 64,
        "img_width": 64,
        "language": "english",
        "skills": ["arithmetic reasoning"],
        "source": "digits",
        "split": "testmini",
        "task": "math word problem",
    }
    kinds = {key: Value("int64") for key in ("img_height", "img_width")} | {"skills": List(STRING)}
    rows = [
        {
            "pid": str(i),
            "question": f"How much is problem {i}?",
            "image": f"images/{i}.jpg",
            "decoded_image": digit(i),
            "choices": choices,
            "unit": None,
            "precision": None if kind == "multi_choice" else 1.0,
            "answer": answer,
            "question_type": kind,
            "answer_type": "text" if kind == "multi_choice" else "integer",
            "metadata": metadata,
            "query": f"Hint: answer. How much is problem {i}?",
        }
        for i, (kind, choices, answer) in enumerate(
            [("multi_choice", ["zero", "one"], "one"), ("free_form", None, "7")]
        )
    ]
    write(
        folder,
        rows,
        "testmini",
        image=STRING,
        decoded_image=Image(),
        choices=List(STRING),
        precision=Value("float64"),
        metadata={key: kinds.get(key, STRING) for key in metadata},
    )


def mmvp(folder: Path) -> None:
    rows = [
        {
            "Index": i + 1,
            "Question": f"Which way does pair {i} look?",
            "Options": "(a) Left (b) Right",
            "Correct Answer": f"({'ab'[i % 2]})",
            "image": digit(i),
        }
        for i in range(4)
    ]
    write(folder, rows, "train", Index=Value("int64"))


SETS = {
    "lmms-lab-encoder/POPE": pope,
    "lmms-lab-encoder/textvqa": textvqa,
    "lmms-lab-encoder/ChartQA": chartqa,
    "lmms-lab-encoder/DocVQA": docvqa,
    "lmms-lab-encoder/ai2d": ai2d,
    "lmms-lab-encoder/MMBench": mmbench,
    "lmms-lab-encoder/ScienceQA": scienceqa,
    "lmms-lab-encoder/MME": mme,
    "lmms-lab-encoder/HallusionBench": hallusion_bench,
    "lmms-lab-encoder/MMVet": mmvet,
    "lmms-lab-encoder/GQA": gqa,
    "lmms-lab-encoder/VQAv2": vqav2,
    "lmms-lab-encoder/SEED-Bench": seedbench,
    "lmms-lab-encoder/MMMU": mmmu,
    "AI4Math/MathVista": mathvista,
    "lmms-lab-eval/MMVP": mmvp,
}


def main() -> None:
    out, *damaged = sys.argv[1:]
    for name, make in SETS.items():
        make(Path(out, name))
    if damaged:
        pope(Path(damaged[0], "lmms-lab-encoder/POPE"), damaged=(0, 2))


if __name__ == "__main__":
    main()
