"""Statistics of images from histograms."""

import numpy as np

from pusht_act.demos.image_stats import count_values, image_stats


def test_counts_of_parts_give_the_statistics_of_all_pixels() -> None:
    random = np.random.default_rng(0)
    # Channels that differ, the first without its extreme values.
    images = random.integers([3, 0, 100], [200, 256, 110], (7, 96, 96, 3), dtype=np.uint8)
    found = image_stats(count_values(images[:3]) + count_values(images[3:]))
    pixels = images.reshape(-1, 3) / 255.0
    np.testing.assert_array_equal(found["min"], pixels.min(0))
    np.testing.assert_array_equal(found["max"], pixels.max(0))
    np.testing.assert_allclose(found["mean"], pixels.mean(0), rtol=1e-11)
    np.testing.assert_allclose(found["std"], pixels.std(0), rtol=1e-11)
    for name, q in (("q01", 0.01), ("q50", 0.5), ("q99", 0.99)):
        np.testing.assert_allclose(found[name], np.quantile(pixels, q, axis=0, method="inverted_cdf"))
