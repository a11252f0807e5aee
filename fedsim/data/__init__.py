"""From rows on a hub, in a directory or in the package, to token stores and partitions."""
