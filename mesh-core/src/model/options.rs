//! Options of the whole mesh.

use serde::Serialize;

/// What happens to connections to destinations that the mesh does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum OutboundMode {
    /// They are passed through.
    #[default]
    AllowAny,
    /// They are refused.
    RegistryOnly,
}

/// Options of the whole mesh.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct MeshOptions {
    /// `encryptSameNode: always`: no direct path, every connection is tunnelled.
    pub encrypt_same_node: bool,
    /// Destinations that the mesh does not know.
    pub outbound: OutboundMode,
}
