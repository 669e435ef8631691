//! Sizes, offsets and alignments against Microsoft's headers.
