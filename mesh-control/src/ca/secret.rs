//! The root on Kubernetes: of the user's Secret `cacerts`, or made once into `undermesh-ca`, which all replicas share.

use std::{collections::BTreeMap, time::SystemTime};

use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{
    Api, Client,
    api::{ObjectMeta, Patch, PatchParams, PostParams},
};
use serde_json::json;

use super::root::{Root, Texts};

/// The user's own authority, in Istio's layout.
pub const GIVEN: &str = "cacerts";
/// The authority that we make where there is none.
pub const MADE: &str = "undermesh-ca";
/// The ConfigMap from which proxies read the roots.
pub const ROOTS: &str = "undermesh-ca-root";
/// Its key.
pub const ROOTS_KEY: &str = "root-cert.pem";
/// Who writes, for the API server.
pub const MANAGER: &str = "undermesh-control";

/// Why there is no root.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The API server does not give it.
    #[error("Secret {namespace}/{name}")]
    Api {
        /// Namespace of the Secret.
        namespace: String,
        /// Its name.
        name: &'static str,
        /// How.
        #[source]
        source: Box<kube::Error>,
    },
    /// It cannot be used, and is not replaced: that would silently replace the trust of the whole mesh.
    #[error("Secret {namespace}/{name}: {reason}")]
    Unusable {
        /// Namespace of the Secret.
        namespace: String,
        /// Its name.
        name: &'static str,
        /// Why.
        reason: String,
    },
    /// No key or certificate can be made.
    #[error("cannot make key or certificate")]
    Make(#[from] rcgen::Error),
}

/// Reads the root, or makes one; replicas that start together all end up with the first one's.
///
/// # Errors
/// The API server does not answer, or what is there cannot be used.
pub async fn open(client: &Client, namespace: &str, now: SystemTime) -> Result<Root, SecretError> {
    let api = Api::<Secret>::namespaced(client.clone(), namespace);
    let failed = |name: &'static str| {
        move |source: kube::Error| SecretError::Api {
            namespace: namespace.to_owned(),
            name,
            source: Box::new(source),
        }
    };
    let usable = |name: &'static str, secret: &Secret| {
        let texts = texts(secret.data.as_ref());
        texts.and_then(|texts| Root::from_texts(&texts, now)).map_err(|reason| SecretError::Unusable {
            namespace: namespace.to_owned(),
            name,
            reason,
        })
    };
    if let Some(given) = api.get_opt(GIVEN).await.map_err(failed(GIVEN))? {
        return usable(GIVEN, &given);
    }
    if let Some(made) = api.get_opt(MADE).await.map_err(failed(MADE))? {
        return usable(MADE, &made);
    }
    let secret = secret_of(&Root::generate(now)?);
    match api.create(&PostParams::default(), &secret).await {
        Ok(made) => {
            tracing::info!(namespace, name = MADE, "a root was made");
            usable(MADE, &made)
        }
        // Another replica was first: its root is everybody's.
        Err(kube::Error::Api(status)) if status.code == 409 => {
            usable(MADE, &api.get(MADE).await.map_err(failed(MADE))?)
        }
        Err(error) => Err(failed(MADE)(error)),
    }
}

fn secret_of(texts: &Texts) -> Secret {
    let data = [
        ("ca-cert.pem", &texts.certificate),
        ("ca-key.pem", &texts.key),
        ("cert-chain.pem", &texts.certificate),
        ("root-cert.pem", &texts.certificate),
    ];
    Secret {
        metadata: ObjectMeta { name: Some(MADE.to_owned()), labels: Some(labels()), ..ObjectMeta::default() },
        data: Some(
            data.map(|(key, text)| (key.to_owned(), ByteString(text.as_bytes().to_vec())))
                .into_iter()
                .collect(),
        ),
        type_: Some("Opaque".to_owned()),
        ..Secret::default()
    }
}

/// (pure) What a Secret in Istio's layout holds.
fn texts(data: Option<&BTreeMap<String, ByteString>>) -> Result<Texts, String> {
    let read = |key: &str| match data.and_then(|data| data.get(key)) {
        Some(value) => {
            String::from_utf8(value.0.clone()).map(Some).map_err(|_| format!("{key} is no PEM text"))
        }
        None => Ok(None),
    };
    let required = |key: &str| read(key)?.ok_or_else(|| format!("{key} is missing"));
    Ok(Texts {
        certificate: required("ca-cert.pem")?,
        key: required("ca-key.pem")?,
        chain: read("cert-chain.pem")?.unwrap_or_default(),
        roots: required("root-cert.pem")?,
    })
}

/// Labels of what is made here and not by the installation.
pub fn labels() -> BTreeMap<String, String> {
    BTreeMap::from([("app.kubernetes.io/part-of".to_owned(), "undermesh".to_owned())])
}

/// Makes the ConfigMap of the roots in `namespace` what it should be; says whether it had to be written.
///
/// # Errors
/// The API server refuses.
pub async fn publish_roots(client: &Client, namespace: &str, roots: &str) -> Result<bool, kube::Error> {
    let api = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    let there = api.get_opt(ROOTS).await?;
    let data = |map: &ConfigMap| {
        map.data.as_ref().and_then(|data| data.get(ROOTS_KEY)).map(String::as_str) == Some(roots)
    };
    match there {
        Some(map) if data(&map) => Ok(false),
        Some(_) => {
            let patch = json!({"data": {ROOTS_KEY: roots}, "metadata": {"labels": labels()}});
            let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
            api.patch(ROOTS, &params, &Patch::Merge(&patch)).await.map(|_| true)
        }
        None => {
            let map = ConfigMap {
                metadata: ObjectMeta {
                    name: Some(ROOTS.to_owned()),
                    labels: Some(labels()),
                    ..ObjectMeta::default()
                },
                data: Some(BTreeMap::from([(ROOTS_KEY.to_owned(), roots.to_owned())])),
                ..ConfigMap::default()
            };
            match api.create(&PostParams::default(), &map).await {
                Ok(_) => Ok(true),
                // Another replica was first, with the same roots.
                Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
                Err(error) => Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_is_what_is_read_and_half_an_authority_is_none() {
        let now = SystemTime::now();
        let secret = secret_of(&Root::generate(now).unwrap());
        let read = |secret: &Secret| {
            texts(secret.data.as_ref()).and_then(|texts| Root::from_texts(&texts, now).map(|_| ()))
        };
        assert_eq!(read(&secret), Ok(()));
        for key in ["ca-cert.pem", "ca-key.pem", "root-cert.pem"] {
            let mut half = secret.clone();
            half.data.as_mut().unwrap().remove(key);
            assert_eq!(read(&half), Err(format!("{key} is missing")));
            half.data.as_mut().unwrap().insert(key.to_owned(), ByteString(vec![0xff]));
            assert!(read(&half).is_err(), "{key}");
        }
    }
}
