"""What a scripted model answers to the questions of ``write_sets.py``, and the scores by hand."""

from __future__ import annotations

from typing import Final

# The first key that stands in the prompt gives the answer.
ANSWERS: Final = {
    # POPE: right, wrong, wrong, right.  One true positive, one false positive, one false negative.
    "Is there a zero": "Yes",
    "Is there a one": "no",
    "Is there a cat": "yes",
    "Is there a dog": "No",
    # TextVQA: all 10 people said stop: 1.  Two of ten said left: beside each of these two one other
    # agrees, 1/3; beside each of the eight two do, 2/3; the mean is (2 / 3 + 8 * 2/3) / 10 = 0.6.
    "written on sign 0": "Stop.",
    "written on sign 1": "left",
    # ChartQA: within 5 %, the case of letters does not matter, beyond 5 %, equal.
    "What is bar 0": "104",
    "What is bar 1": "blue",
    "What is bar 2": "37",
    "What is bar 3": "7.0",
    # DocVQA: equal; one of five letters differs, 1 - 1/5; nothing in common, 0.
    "name in document 0": "Seven",
    "name in document 1": "eighs",
    "name in document 2": "xyz",
    # AI2D: the letter, the letter with its text, a wrong letter.
    "is label 0": "A",
    "is label 1": "B. four",
    "is label 2": "D",
    # MMBench: letter, letter with a full stop, the text of the choice, a wrong letter.
    "in picture 0": "A",
    "in picture 1": "B.",
    "in picture 2": "It is two",
    "in picture 3": "A",
    # ScienceQA: right, wrong.
    "in exercise 0": "A",
    "in exercise 1": "A. a zero",
    # MME: a picture scores 100 for each half right and 100 more for both: category count has
    # (200 + 50) / 2 = 125, code_reasoning 0.
    "Is 0 shown in count": "Yes",
    "Is 0 absent in count": "No.",
    "Is 1 shown in count": "yes",
    "Is 1 absent in count": "yes",
    "Is 2 shown in code": "no",
    "Is 2 absent in code": "maybe",
    # GQA: right, wrong.
    "colour is object 0": "White",
    "colour is object 1": "white",
    # VQAv2: all said yes: 1.  Seven said two (three of them suffice): 1.
    "on plate 0": "yes",
    "on plate 1": "two",
    # SEED: the first letter counts: right, wrong.
    "Where is digit 0": "A. left",
    "Where is digit 1": "A",
    # MMMU: letter in brackets; the second question has two pictures; an open one.
    "Which digit is": "(A)",
    "less than": "A",
    "and one?": "The answer is 2.",
    # MMVP: all right, but for one of the second pair.
    "Which way does pair 0": "A",
    "Which way does pair 1": "(B)",
    "Which way does pair 2": "A",
    "Which way does pair 3": "a",
    # MathVista: a choice, a number.
    "problem 0": "one",
    "problem 1": "8",
    # MM-Vet and HallusionBench are judged.
    "much is sum 0": "It is 0.",
    "much is sum 1": "It is 5.",
    "Is curve 0": "Yes, curve 0 is a circle.",
    "Is curve 1": "Yes, curve 1 is a circle.",
}

SCORES: Final = {
    "POPE": 50.0,
    "TextVQA": 80.0,
    "ChartQA": 75.0,
    "DocVQA": 60.0,
    "AI2D": 66.67,
    "MMBench-EN": 75.0,
    "ScienceQA-IMG": 50.0,
    "MME": 125.0,
    "GQA": 50.0,
    "VQAv2": 100.0,
    "SEED-Image": 50.0,
    "MMMU-val": 66.67,
    "MMVP": 75.0,
    "MathVista": 50.0,
    "MM-Vet": 50.0,
    "HallusionBench": 50.0,
}
METRICS: Final = {
    "POPE": {
        "pope_accuracy": 0.5,
        "pope_precision": 0.5,
        "pope_recall": 0.5,
        "pope_f1_score": 0.5,
        "pope_yes_ratio": 0.5,
    },
    "ChartQA": {
        "relaxed_overall": 0.75,
        "relaxed_human_split": 1.0,
        "relaxed_augmented_split": 0.5,
    },
    "MME": {"mme_perception_score": 125.0, "mme_cognition_score": 0.0},
    "MMVP": {"mmvp_accuracy": 0.75, "mmvp_pair_accuracy": 0.5},
    "HallusionBench": {"aAcc": 50.0, "fAcc": 50.0, "qAcc": 50.0},
}


def scripted(prompt: str) -> str:
    """The answer to a prompt."""
    return next(answer for part, answer in ANSWERS.items() if part in prompt)


def judged(prompt: str) -> str:
    """What a judge says: a score for MM-Vet, a word for HallusionBench."""
    if "Correctness" in prompt:
        return "1.0" if "It is 0." in prompt else "0.0"
    return "correct" if "Yes, curve 0" in prompt else "incorrect"
