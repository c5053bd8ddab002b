"""What the bookshop does in the background: ordinary functions, in which ``time.sleep`` stands for the work."""

from __future__ import annotations

import re
import time
from collections import Counter
from random import Random
from typing import Literal, NamedTuple

from flask import request

from flask_executor import Executor, current_job, track

executor = Executor()  # app.py binds it to the app

BOOKS = ("Dracula", "Emma", "Ivanhoe", "Kidnapped", "Little Women", "Middlemarch", "Moby-Dick", "Persuasion", "Walden")


class Sale(NamedTuple):
    """A line of the sales report."""

    title: str
    copies: int
    revenue: float


@executor.job(name="Sales report")
def add_up_sales(month: str) -> list[Sale]:
    random = Random(month)
    sales = []
    for title in track(BOOKS, message="adding up"):  # a step of the progress bar for each book
        time.sleep(0.6)
        copies = random.randrange(20, 240)
        sales.append(Sale(title, copies, copies * random.randrange(899, 1699) / 100))
    return sorted(sales, key=lambda sale: sale.revenue, reverse=True)


@executor.job(name="Prices")
def fetch_prices(call: int) -> dict[str, float]:
    for step in track(range(8), message="asking the wholesaler"):
        time.sleep(0.3)
        if step == 5 and call % 2:
            raise ConnectionError("the wholesaler has hung up; call again")
    return {title: Random(f"{title} {call}").randrange(499, 999) / 100 for title in BOOKS}


@executor.job(name="Stocktaking")
def count_stock() -> int:
    books = 0
    for shelf in track(range(1, 201), message="counting"):  # leaves here when it is asked to stop
        time.sleep(0.3)
        books += 20 + shelf % 7
    return books


class Order(NamedTuple):
    """What a customer wants."""

    number: int
    titles: tuple[str, ...]


def load_order(number: int) -> Order:
    return Order(number, tuple(Random(number).sample(BOOKS, 3)))


def pack(order: Order) -> int:
    for _title in track(order.titles, message="wrapping"):
        time.sleep(1)
    return 400 * len(order.titles)


def write_invoice(order: Order, grams: int) -> float:
    current_job.update(message="writing")  # no number: the bar only moves
    time.sleep(2.5)
    return len(order.titles) * 12.5 + grams * 0.005


@executor.job(name="Labels")
def print_labels(count: int) -> int:
    for number in track(range(1, count + 1)):
        current_job.update(message=f"label {number} of {count}")
        time.sleep(0.4)
    return count


@executor.job(name="Covers")
def resize_covers(shelf: Literal["novels", "poems", "plays"], width: int = 300) -> dict[str, object]:
    for _cover in track(range(24), message=f"resizing {shelf}"):
        time.sleep(0.2)
    return {"shelf": shelf, "covers": 24, "width": width}


@executor.job(name="Manuscript")
def read_manuscript() -> dict[str, int]:
    text = request.files["manuscript"].read().decode(errors="replace")  # the request was answered long ago
    lines = text.splitlines()
    words: Counter[str] = Counter()
    for line in track(lines, message="reading"):
        time.sleep(3 / len(lines))
        words.update(re.findall(r"\w{4,}", line.lower()))
    return dict(words.most_common(10))


@executor.job(name="Parcel")
def send_parcel(number: int) -> str:
    for _step in track(range(10), message=f"parcel {number}"):
        time.sleep(0.05 * (1 + number % 6))
    if number % 9 == 0:
        raise ValueError(f"parcel {number} has no address")
    return f"parcel {number} is on its way"
