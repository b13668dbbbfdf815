//! Options of the whole mesh (ours).
#![expect(missing_docs, reason = "fields are those of model::MeshOptions")]

use super::Malformed;
use crate::model::{self, OutboundMode};

#[derive(Clone, PartialEq, prost::Message)]
pub struct MeshOptions {
    #[prost(bool, tag = "1")]
    pub encrypt_same_node: bool,
    /// 0 = ALLOW_ANY, 1 = REGISTRY_ONLY.
    #[prost(uint32, tag = "2")]
    pub outbound_mode: u32,
}

/// Resource name of the one object of this type.
pub const NAME: &str = "mesh";

impl From<&model::MeshOptions> for MeshOptions {
    fn from(options: &model::MeshOptions) -> Self {
        let model::MeshOptions { encrypt_same_node, outbound } = options;
        Self {
            encrypt_same_node: *encrypt_same_node,
            outbound_mode: u32::from(*outbound == OutboundMode::RegistryOnly),
        }
    }
}

impl TryFrom<MeshOptions> for model::MeshOptions {
    type Error = Malformed;

    fn try_from(message: MeshOptions) -> Result<Self, Malformed> {
        let MeshOptions { encrypt_same_node, outbound_mode } = message;
        let outbound = match outbound_mode {
            0 => OutboundMode::AllowAny,
            1 => OutboundMode::RegistryOnly,
            other => return Err(Malformed::new("outbound_mode", format!("unknown value {other}"))),
        };
        Ok(Self { encrypt_same_node, outbound })
    }
}
