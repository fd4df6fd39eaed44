"""From files to batches: numpy, PIL and Grain. Never imports jax, so that data workers start fast and own no device.

A *record* is what is in a file, an *example* is a conversation with its images, whatever it was read from, and a *row* is a
row of a batch, which holds one example or, packed, several. On its way a record passes the packages in this order:

- `formats`: files by path or URL, JSON and tables by random access, record styles, image files; `shards`: examples with their
  images inside, as `prepare` writes them. `open.open_files` finds out which of them a path is.
- `encode`: template, tokenizer, labels, views of images; `encode/batch_rows.py` places encoded examples into a batch.
- `order`: mixtures and their filters, lengths, packs, and which examples make up which batch.
- `open.py` and `pipeline.py` put all of it together, from a configuration to batches; `fingerprint.py` says what data it was.
"""
