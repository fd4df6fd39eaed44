"""Which examples make up which batch: mixture, filters, lengths, packing, schedule."""
