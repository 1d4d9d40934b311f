//! SwiGLU.
