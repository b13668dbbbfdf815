//! A Kubernetes cluster as meshctl reaches it: objects by server-side apply, and questions to our processes through the
//! API server's exec, so that whoever may exec into our pods may ask and nobody else.

pub mod kinds;

use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config,
    api::{
        ApiResource, AttachParams, DeleteParams, DynamicObject, ListParams, Patch, PatchParams,
        PropagationPolicy,
    },
    config::{KubeConfigOptions, Kubeconfig},
    core::GroupVersionKind,
    discovery::{ApiGroup, Discovery, Scope, verbs},
};
use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _};

use kinds::Kind;

/// Who applied a field, as the API server remembers it.
const MANAGER: &str = "meshctl";
/// The API server answers one request within this.
const ANSWER: Duration = Duration::from_secs(30);
/// A command that drains says nothing for almost a minute.
const SILENCE: Duration = Duration::from_secs(60);
/// A command in a pod ends within this.
const COMMAND: Duration = Duration::from_secs(20);
/// More than any answer of ours has.
const OUTPUT: u64 = 64 << 20;

/// Why the API server did not do it.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// Rights are missing; the message names user, verb and resource.
    #[error("API denied: {0}")]
    Denied(String),
    /// The kind does not exist in this cluster.
    #[error("the cluster has no {0}")]
    NoKind(&'static str),
    /// It was understood and refused.
    #[error("API: {0}")]
    Refused(String),
    /// It did not answer.
    #[error("the API server does not answer")]
    Silent(#[source] kube::Error),
    /// It did not end.
    #[error("no answer within {} seconds", .0.as_secs())]
    Deadline(Duration),
    /// A command in a pod failed.
    #[error("{0}")]
    Command(String),
}

impl ClusterError {
    fn new(kind: Kind, error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 403 => Self::Denied(status.message.clone()),
            kube::Error::Api(status) if status.code == 404 && status.details.is_none() => {
                Self::NoKind(kind.plural)
            }
            kube::Error::Api(status) => Self::Refused(status.message.clone()),
            other => Self::Silent(other),
        }
    }
}

/// Which cluster.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Target {
    /// File of the cluster; else KUBECONFIG, else the usual places.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<std::path::PathBuf>,
    /// Context of that file.
    #[arg(long)]
    pub context: Option<String>,
}

/// A connection to the API server.
#[derive(Clone)]
pub struct Cluster {
    client: Client,
    namespace: String,
}

impl Cluster {
    /// Reads the configuration; does not ask the server yet.
    ///
    /// # Errors
    /// No usable configuration.
    pub async fn connect(target: &Target) -> anyhow::Result<Self> {
        let options = KubeConfigOptions { context: target.context.clone(), ..KubeConfigOptions::default() };
        let mut config = match (&target.kubeconfig, &target.context) {
            (Some(file), _) => {
                let read = Kubeconfig::read_from(file).with_context(|| file.display().to_string())?;
                Config::from_custom_kubeconfig(read, &options).await?
            }
            (None, Some(_)) => Config::from_kubeconfig(&options).await?,
            (None, None) => {
                Config::infer().await.context("find a cluster: set KUBECONFIG or --kubeconfig")?
            }
        };
        config.connect_timeout = Some(ANSWER);
        // Of the connection, on which a command may be silent for long; requests have their own bound.
        config.read_timeout = Some(SILENCE);
        config.write_timeout = Some(ANSWER);
        let namespace = config.default_namespace.clone();
        let client = Client::try_from(config).context("prepare the connection to the API server")?;
        Ok(Self { client, namespace })
    }

    /// The namespace of the context.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    fn api(&self, kind: Kind, namespace: Option<&str>) -> Api<DynamicObject> {
        let resource = kind.resource();
        match namespace.filter(|_| kind.namespaced) {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, &resource),
            None => Api::all_with(self.client.clone(), &resource),
        }
    }

    /// Major and minor version of the server.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn version(&self) -> Result<String, ClusterError> {
        let asked = within(ANSWER, self.client.apiserver_version()).await?;
        asked.map(|info| info.git_version).map_err(ClusterError::Silent)
    }

    /// Makes an object be as given: fields that are not given stay as others set them. Safe to repeat.
    ///
    /// # Errors
    /// What the server says.
    pub async fn apply(&self, kind: Kind, object: &Value) -> Result<(), ClusterError> {
        let namespace = object["metadata"]["namespace"].as_str();
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let params = PatchParams::apply(MANAGER).force();
        let api = self.api(kind, namespace);
        let applied = within(ANSWER, api.patch(name, &params, &Patch::Apply(object))).await?;
        applied.map(drop).map_err(|error| ClusterError::new(kind, error))
    }

    /// Merges a JSON merge patch into an object.
    ///
    /// # Errors
    /// What the server says.
    pub async fn merge(
        &self,
        kind: Kind,
        (namespace, name): (Option<&str>, &str),
        patch: &Value,
    ) -> Result<(), ClusterError> {
        let api = self.api(kind, namespace);
        let patched = within(ANSWER, api.patch(name, &PatchParams::default(), &Patch::Merge(patch))).await?;
        patched.map(drop).map_err(|error| ClusterError::new(kind, error))
    }

    /// Creates an object and returns it as the server has it: how reviews are asked.
    ///
    /// # Errors
    /// What the server says.
    pub async fn create(&self, kind: Kind, object: &Value) -> Result<Value, ClusterError> {
        let object: DynamicObject = serde_json::from_value(object.clone())
            .map_err(|error| ClusterError::Refused(error.to_string()))?;
        let api = self.api(kind, object.metadata.namespace.as_deref());
        let created = within(ANSWER, api.create(&Default::default(), &object)).await?;
        created.map_err(|error| ClusterError::new(kind, error)).map(|object| value(&object))
    }

    /// An object; none when it is not there, or its kind is not.
    ///
    /// # Errors
    /// What the server says.
    pub async fn get(
        &self,
        kind: Kind,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<Option<Value>, ClusterError> {
        let found = within(ANSWER, self.api(kind, namespace).get_opt(name)).await?;
        found
            .map(|object| object.map(|object| value(&object)))
            .map_err(|error| ClusterError::new(kind, error))
    }

    /// Objects of a namespace, or of all, by labels (`a=b,c`; empty for all); none when the kind does not exist.
    ///
    /// # Errors
    /// What the server says.
    pub async fn list(
        &self,
        kind: Kind,
        namespace: Option<&str>,
        labels: &str,
    ) -> Result<Vec<Value>, ClusterError> {
        let params = ListParams::default().labels(labels);
        match within(ANSWER, self.api(kind, namespace).list(&params)).await? {
            Ok(list) => Ok(list.items.iter().map(value).collect()),
            Err(error) => match ClusterError::new(kind, error) {
                ClusterError::NoKind(_) => Ok(Vec::new()),
                error => Err(error),
            },
        }
    }

    /// How many objects a definition of a kind has.
    ///
    /// # Errors
    /// What the server says.
    pub async fn count(&self, definition: &Value) -> Result<usize, ClusterError> {
        let spec = &definition["spec"];
        let versions = spec["versions"].as_array().into_iter().flatten();
        let served =
            versions.filter(|version| version["served"] == true).find_map(|version| version["name"].as_str());
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (group, version, plural) =
            (text(&spec["group"]), served.unwrap_or("v1"), text(&spec["names"]["plural"]));
        let resource =
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(&group, version, &plural), &plural);
        let api: Api<DynamicObject> = Api::all_with(self.client.clone(), &resource);
        match within(ANSWER, api.list_metadata(&ListParams::default())).await? {
            // What is on its way out is nobody's use of the kind.
            Ok(list) => Ok(list.items.iter().filter(|one| one.metadata.deletion_timestamp.is_none()).count()),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(0),
            Err(error) => Err(ClusterError::new(kinds::CUSTOM_RESOURCE, error)),
        }
    }

    /// Deletes an object and, before it is gone, what it owns; says whether it was there.
    ///
    /// # Errors
    /// What the server says.
    pub async fn delete(
        &self,
        kind: Kind,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<bool, ClusterError> {
        let params = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Foreground),
            ..DeleteParams::default()
        };
        match within(ANSWER, self.api(kind, namespace).delete(name, &params)).await? {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            Err(error) => Err(ClusterError::new(kind, error)),
        }
    }

    /// What a command in a container prints.
    ///
    /// # Errors
    /// It cannot be run, does not end in time, or fails; then with what it printed.
    pub async fn exec(
        &self,
        pod: (&str, &str),
        container: &str,
        command: &[&str],
    ) -> Result<String, ClusterError> {
        self.exec_within(COMMAND, pod, container, command).await
    }

    /// The same for a command that may take longer.
    ///
    /// # Errors
    /// As for [`exec`](Self::exec).
    pub async fn exec_within(
        &self,
        limit: Duration,
        (namespace, pod): (&str, &str),
        container: &str,
        command: &[&str],
    ) -> Result<String, ClusterError> {
        within(limit, self.run(namespace, pod, container, command)).await?
    }

    /// The objects of every kind that a namespace holds, as metadata with `kind` and `apiVersion`.
    ///
    /// # Errors
    /// The kinds, or the objects of one of them, cannot be listed.
    pub async fn inhabitants(&self, namespace: &str) -> Result<Vec<Value>, ClusterError> {
        let discovery = within(ANSWER, Discovery::new(self.client.clone()).run()).await?;
        let discovery = discovery.map_err(ClusterError::Silent)?;
        let mut found = Vec::new();
        for (resource, capabilities) in discovery.groups().flat_map(ApiGroup::recommended_resources) {
            if capabilities.scope != Scope::Namespaced || !capabilities.supports_operation(verbs::LIST) {
                continue;
            }
            let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &resource);
            let listed = match within(ANSWER, api.list_metadata(&ListParams::default())).await? {
                // The kind has gone since it was told.
                Err(kube::Error::Api(status)) if status.code == 404 => continue,
                listed => listed.map_err(|error| ClusterError::new(kinds::CUSTOM_RESOURCE, error))?,
            };
            found.extend(listed.items.iter().map(|object| {
                json!({"apiVersion": resource.api_version, "kind": resource.kind, "metadata": object.metadata})
            }));
        }
        Ok(found)
    }

    async fn run(
        &self,
        namespace: &str,
        pod: &str,
        container: &str,
        command: &[&str],
    ) -> Result<String, ClusterError> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let params = AttachParams::default().container(container);
        let started = api.exec(pod, command.iter().copied(), &params).await;
        let mut process = started.map_err(|error| ClusterError::new(kinds::POD, error))?;
        let (stdout, stderr, status) = (process.stdout(), process.stderr(), process.take_status());
        let (stdout, stderr) = futures_util::future::join(text(stdout), text(stderr)).await;
        let status = match status {
            Some(status) => status.await,
            None => None,
        };
        match status {
            Some(status) if status.status.as_deref() == Some("Success") => Ok(stdout),
            Some(status) => {
                let said = [stderr.trim(), stdout.trim()].into_iter().find(|text| !text.is_empty());
                Err(ClusterError::Command(said.map_or(status.message.unwrap_or_default(), str::to_owned)))
            }
            None => Err(ClusterError::Command("the connection ended before the command".to_owned())),
        }
    }
}

async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Result<T, ClusterError> {
    tokio::time::timeout(limit, work).await.map_err(|_| ClusterError::Deadline(limit))
}

async fn text(stream: Option<impl AsyncRead + Unpin>) -> String {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        // A stream that breaks ends the text; the status tells whether that matters.
        let _ = stream.take(OUTPUT).read_to_end(&mut bytes).await;
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn value(object: &DynamicObject) -> Value {
    serde_json::to_value(object).unwrap_or_default()
}
