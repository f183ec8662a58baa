"""Places for requests at work, and how clients share them."""

from contextlib import ExitStack

import pytest

from sinkattn.serve.errors import ApiError
from sinkattn.serve.places import Places


class Clients:
    """Clients that take places and give them back."""

    def __init__(self, count, is_shared=True):
        self.places, self.held = Places(count, is_shared=is_shared), {}

    def take(self, owner):
        """Whether there was a place."""
        stack = ExitStack()
        try:
            stack.enter_context(self.places.taken(owner))
        except ApiError:
            return False
        self.held.setdefault(owner, []).append(stack)
        return True

    def take_all(self, owner):
        """How many there were."""
        count = 0
        while self.take(owner):
            count += 1
        return count

    def give_back(self, owner):
        self.held[owner].pop().close()


def test_a_client_alone_has_all_places():
    clients = Clients(7, is_shared=False)
    assert clients.take_all("") == clients.places.num_taken == 7
    clients.give_back("")
    assert clients.take_all("") == 1


def test_a_busy_client_leaves_half_of_the_places():
    clients = Clients(64)
    assert clients.take_all("a") == 32
    assert clients.take_all("b") == 16
    for _ in range(32):  # a comes back at once whenever a request of it ends
        clients.give_back("a")
        clients.take_all("b")
        clients.take_all("a")
    held = {owner: len(stacks) for owner, stacks in clients.held.items()}
    assert min(held.values()) >= 20
    assert clients.places.num_taken == sum(held.values()) <= 44


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_a_client_without_a_place_gets_one_though_others_are_busy(count):
    clients = Clients(count)
    for index in range(count):
        clients.take_all(f"busy {index}")
        assert clients.places.num_taken == count or clients.take(f"new {index}")


def test_an_error_gives_the_place_back():
    places = Places(1, is_shared=True)
    with pytest.raises(ValueError, match="x"), places.taken("a"):
        raise ValueError("x")
    with places.taken("b"):
        with pytest.raises(ApiError, match="1 requests are at work, 0 of this client") as caught, places.taken("a"):
            pass
        assert (caught.value.status, caught.value.retry_after, places.num_taken) == (429, 1, 1)
