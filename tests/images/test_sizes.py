"""Images stay as small as they are said to be."""

from __future__ import annotations

import pytest

from images.build import IMAGES, BuildFailed, Image, check_size


def test_an_image_that_has_grown_fails_with_its_size_and_its_limit() -> None:
    image = Image("operator", most_mb=310)
    check_size(image, 310_000_000)
    with pytest.raises(BuildFailed, match="operator is 311 MB, and may be 310 MB"):
        check_size(image, 310_900_000)


def test_every_image_of_the_test_cluster_has_a_limit() -> None:
    assert [image.name for image in IMAGES if image.for_tests and not image.most_mb] == []
