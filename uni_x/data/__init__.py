"""Data: from source rows to packed training rows, and from prompts to ids.

The way of a sample: `readers` give source rows, `encode` turns their pictures into codes on disk (`shards`),
`render` turns samples into ids and labels, `packing` joins them into rows, `dataset` serves the rows of an epoch
and `collate` makes batches. Prompts take the same `render`.
"""
