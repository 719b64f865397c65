"""Semantic distribution similarity is Eq. 5 of the paper, word for word."""

from pathlib import Path

import numpy as np
import pytest

from privimage.errors import UserError
from privimage.evaluation.semantics import embed, load_vectors, similarity

VECTORS = {
    "dog": np.array([2.0, 0.0]),
    "cat": np.array([0.0, 1.0]),
    "wolf": np.array([3.0, 4.0]),
    "car": np.array([-1.0, 0.0]),
}


def test_a_hand_computed_example() -> None:
    # A: dog 3, cat 1. B: wolf 1, car 1. cos(dog, wolf) = 0.6, cos(cat, wolf) = 0.8, cos(dog, car) = -1,
    # cos(cat, car) = 0
    expected = 0.75 * 0.5 * 0.6 + 0.25 * 0.5 * 0.8 + 0.75 * 0.5 * -1 + 0.25 * 0.5 * 0
    found = similarity(["dog", "cat"], np.array([3, 1]), ["wolf", "car"], np.array([5, 5]), VECTORS)
    assert found["sds"] == pytest.approx(expected)
    assert found["covered"] == [1.0, 1.0]


def test_one_class_against_itself_is_one() -> None:
    assert similarity(["dog"], np.array([7]), ["dog"], np.array([2]), VECTORS)["sds"] == pytest.approx(1)


def test_a_name_of_several_words_is_the_mean_of_those_that_have_a_vector() -> None:
    assert embed("Wolf_dog, Canis lupus", VECTORS) == pytest.approx(np.array([5.0, 4.0]) / np.sqrt(41))
    assert embed("Canis lupus", VECTORS) is None


def test_classes_without_a_word_are_left_out_and_told() -> None:
    found = similarity(["dog", "zzz"], np.array([1, 3]), ["dog"], np.array([1]), VECTORS)
    assert found["sds"] == pytest.approx(1)
    assert found["covered"] == [0.25, 1.0]
    assert similarity(["zzz"], np.array([1]), ["dog"], np.array([1]), VECTORS)["sds"] is None


def test_real_vectors_find_cifars_animals_nearer_to_animals_than_to_vehicles(shared_data: Path) -> None:
    vectors = load_vectors(next((shared_data / "words").glob("*.npz")))
    animals, vehicles = ["cat", "dog", "horse"], ["truck", "ship", "airplane"]
    pets = ["Siamese cat, Siamese", "Egyptian cat", "golden retriever dog"]
    equal = np.ones(3)
    assert (
        similarity(pets, equal, animals, equal, vectors)["sds"]
        > similarity(pets, equal, vehicles, equal, vectors)["sds"] + 0.1
    )


@pytest.mark.parametrize("content", ["absent", "garbage", "other", "ragged"])
def test_bad_word_vectors_end_in_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "words.npz"
    if content == "garbage":
        path.write_bytes(b"no vectors")
    elif content == "other":
        np.savez(path, images=np.zeros(3))
    elif content == "ragged":
        np.savez(path, words=np.array(["a", "b"]), vectors=np.zeros((3, 4)))
    with pytest.raises(UserError, match=r"evaluate\.word_vectors: .*words\.npz: .+"):
        load_vectors(path)
