import random
from dataclasses import replace

import pytest

from memseg.planning import Work
from memseg.planning.roofline import ProductKind, Products, merged

from .cases import card


def product(flops: int, moved_bytes: int, kind: ProductKind = ProductKind.MATRIX) -> Work:
    return Work(flops, 0, 1, (Products.of(kind, flops, moved_bytes),))


def roofline_card(*, flops: float, bandwidth: float, **other: float):
    return replace(card(10), flops=flops, bandwidth=bandwidth, **other)


def test_a_product_takes_the_longer_of_arithmetic_and_memory():
    on = roofline_card(flops=100.0, bandwidth=1.0)
    assert on.seconds(product(flops=100_000, moved_bytes=10)) == 1000.0
    assert on.seconds(product(flops=100_000, moved_bytes=100_000)) == 100_000.0


def test_the_card_decides_what_a_product_waits_for():
    work = product(flops=64_000, moved_bytes=1_000)
    assert roofline_card(flops=10.0, bandwidth=1.0).seconds(work) == 6400.0
    assert roofline_card(flops=1000.0, bandwidth=1.0).seconds(work) == 1000.0


def test_each_operation_costs_its_overhead_whatever_the_efficiency():
    on = replace(card(10), overhead_s=0.5, efficiency=0.25)
    assert on.seconds(Work(0, 3, operations=4)) == 3 / 0.25 + 4 * 0.5


def test_flops_that_are_in_no_class_are_float32_products_that_never_wait():
    on = roofline_card(flops=2.0, bandwidth=1.0, half_flops=8.0)
    half = Products.of(ProductKind.FLOAT16, 800, 8)
    assert on.seconds(Work(1000, 3, 1, (half,))) == 800 / 8 + 200 / 2 + 3


def test_seconds_of_a_sum_are_the_sum_of_the_seconds():
    generator = random.Random(0)
    on = roofline_card(flops=50.0, bandwidth=1.0, convolution_flops=80.0, half_flops=300.0, overhead_s=0.1)
    works = [
        product(generator.randint(1, 10**9), generator.randint(1, 10**7), generator.choice(list(ProductKind)))
        + Work(generator.randint(0, 100), generator.randint(0, 100))
        for _ in range(200)
    ]
    assert on.seconds(sum(works, Work(0, 0))) == pytest.approx(sum(map(on.seconds, works)))


def test_classes_err_by_a_fifth_at_most_and_only_where_the_ridge_falls_into_one():
    generator = random.Random(1)
    on = roofline_card(flops=70.0, bandwidth=1.0)
    for _ in range(1000):
        flops, moved = generator.randint(1, 10**7), generator.randint(1, 10**5)
        exact, found = max(flops / 70, moved), on.seconds(product(flops, moved))
        assert found <= exact <= found * 2**0.25 * 1.0001
        if not 70 / 2**0.5 <= flops / moved <= 70 * 2**0.5:
            assert found == pytest.approx(exact)


def test_products_of_a_class_are_merged_and_their_order_does_not_matter():
    one, other = Products.of(ProductKind.MATRIX, 100, 10), Products.of(ProductKind.CONVOLUTION, 100, 10)
    assert merged([one, other, one]) == merged([other, one, one])
    assert merged([one, one]) == (Products(ProductKind.MATRIX, one.intensity, 200, 20),)
    assert (product(100, 10) + product(100, 10)).products == merged([one, one])


@pytest.mark.parametrize(
    ("capability", "kind", "rate"),
    [
        ("8.6", ProductKind.MATRIX, 1.0),
        ("8.6", ProductKind.CONVOLUTION, 2.0),
        ("8.6", ProductKind.FLOAT16, 3.0),
        ("8.6", ProductKind.BFLOAT16, 3.0),
        ("7.5", ProductKind.FLOAT16, 3.0),
        ("7.5", ProductKind.BFLOAT16, 1.0),
        (None, ProductKind.BFLOAT16, 3.0),
        ("8.6", ProductKind.FLOAT64, 0.5),
    ],
)
def test_each_kind_has_its_rate(capability, kind, rate):
    on = replace(card(10), compute_capability=capability, convolution_flops=2.0, half_flops=3.0)
    assert on.flops_of(kind) == rate


@pytest.mark.parametrize("kind", [kind for kind in ProductKind if kind is not ProductKind.FLOAT64])
def test_a_card_without_faster_units_computes_everything_at_the_rate_of_float32(kind):
    assert card(10, flops=7.0).flops_of(kind) == 7.0
