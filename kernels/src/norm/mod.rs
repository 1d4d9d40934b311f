//! Global norm and clipping of gradients.
