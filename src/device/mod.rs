//! Where slots live and who runs the two node kernels.

pub mod host;
