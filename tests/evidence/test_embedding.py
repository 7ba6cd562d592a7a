"""Laws of the embedding that finds neighbours."""

import torch

from evidence.embedding import PcaEmbedding, nearest_neighbours


def test_the_nearest_to_a_pool_image_is_itself(images):
    pool = images(30)
    embedding = PcaEmbedding.fit(pool)

    found = nearest_neighbours(embedding.embed(pool[[4, 9]]), embedding.embed(pool), 1)

    assert found.tolist() == [4, 9]


def test_all_components_keep_all_distances(images):
    pool = images(40)
    embedded = PcaEmbedding.fit(pool).embed(pool)

    flat = pool.flatten(1).float() / 255
    torch.testing.assert_close(torch.pdist(embedded), torch.pdist(flat))


def test_components_are_orthonormal_and_by_falling_variance(images):
    pool = images(25)
    embedding = PcaEmbedding.fit(pool, components=6)

    variance = embedding.embed(pool).var(0)

    torch.testing.assert_close(embedding.components @ embedding.components.T, torch.eye(6), rtol=0, atol=1e-5)
    assert (variance.diff() <= 1e-6).all()


def test_neighbours_come_once_and_never_more_than_there_are(images):
    embedded = PcaEmbedding.fit(images(3)).embed(images(3))

    assert nearest_neighbours(embedded, embedded, 10).tolist() == [0, 1, 2]


def test_nothing_to_search_gives_no_neighbours(images):
    embedding = PcaEmbedding.fit(images(0))

    assert nearest_neighbours(embedding.embed(images(2)), embedding.embed(images(0)), 5).tolist() == []


def test_large_pictures_are_averaged_down():
    pool = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    embedding = PcaEmbedding.fit(pool)

    assert embedding.mean.shape == (3 * 32 * 32,)
    assert "32 x 32" in embedding.method
