//! Boot protocols from the outside: images in, what stands in memory and registers out.
//!
//! Pure tests: no device, no guest. `real_images` looks at kernels of the host if there are any.

mod errors;
mod mutations;
mod plans;
mod real_images;
mod running;
mod support;
