//! WHPX on arm64: to be declared here; `windows-sys` gives the x86-64 structures on this architecture.
