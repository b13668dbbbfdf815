//! Filters of rules and backends.

use std::sync::Arc;

use crate::{
    model,
    proto::{Malformed, each, port},
};

#[derive(Clone, PartialEq, prost::Message)]
pub struct Filters {
    #[prost(message, optional, tag = "1")]
    pub request: Option<HeaderEdit>,
    #[prost(message, optional, tag = "2")]
    pub response: Option<HeaderEdit>,
    #[prost(message, optional, tag = "3")]
    pub rewrite: Option<Rewrite>,
    #[prost(message, optional, tag = "4")]
    pub redirect: Option<Redirect>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct HeaderEdit {
    #[prost(string, repeated, tag = "1")]
    pub remove: Vec<String>,
    #[prost(message, repeated, tag = "2")]
    pub set: Vec<Field>,
    #[prost(message, repeated, tag = "3")]
    pub add: Vec<Field>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Field {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub value: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Rewrite {
    #[prost(string, optional, tag = "1")]
    pub hostname: Option<String>,
    #[prost(message, optional, tag = "2")]
    pub path: Option<PathEdit>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Redirect {
    #[prost(string, optional, tag = "1")]
    pub scheme: Option<String>,
    #[prost(string, optional, tag = "2")]
    pub hostname: Option<String>,
    #[prost(message, optional, tag = "3")]
    pub path: Option<PathEdit>,
    #[prost(uint32, optional, tag = "4")]
    pub port: Option<u32>,
    #[prost(uint32, tag = "5")]
    pub status: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct PathEdit {
    #[prost(oneof = "path_edit::Edit", tags = "1, 2")]
    pub edit: Option<path_edit::Edit>,
}

pub mod path_edit {
    #[derive(Clone, PartialEq, prost::Oneof)]
    pub enum Edit {
        #[prost(string, tag = "1")]
        Full(String),
        #[prost(string, tag = "2")]
        Prefix(String),
    }
}

/// Statuses that a redirect may have.
const REDIRECTS: [u32; 5] = [301, 302, 303, 307, 308];

impl TryFrom<Filters> for model::Filters {
    type Error = Malformed;

    fn try_from(message: Filters) -> Result<Self, Malformed> {
        let Filters { request, response, rewrite, redirect } = message;
        Ok(Self {
            request: header_edit(request.unwrap_or_default())?,
            response: header_edit(response.unwrap_or_default())?,
            rewrite: rewrite.map(rewrite_of).transpose().map_err(|error| error.within("rewrite"))?,
            redirect: redirect.map(redirect_of).transpose().map_err(|error| error.within("redirect"))?,
        })
    }
}

fn header_edit(message: HeaderEdit) -> Result<model::HeaderEdit, Malformed> {
    let HeaderEdit { remove, set, add } = message;
    let field = |Field { name, value }: Field| Ok((Arc::from(name), Arc::from(value)));
    Ok(model::HeaderEdit {
        remove: remove.into_iter().map(Arc::from).collect(),
        set: each("set", set, field)?,
        add: each("add", add, field)?,
    })
}

fn rewrite_of(message: Rewrite) -> Result<model::Rewrite, Malformed> {
    let Rewrite { hostname, path } = message;
    Ok(model::Rewrite { hostname: hostname.map(Arc::from), path: path.map(path_edit_of).transpose()? })
}

fn redirect_of(message: Redirect) -> Result<model::Redirect, Malformed> {
    let Redirect { scheme, hostname, path, port: number, status } = message;
    if !REDIRECTS.contains(&status) {
        return Err(Malformed::new("status", format!("{status} is not a redirect")));
    }
    Ok(model::Redirect {
        scheme: scheme.map(Arc::from),
        hostname: hostname.map(Arc::from),
        path: path.map(path_edit_of).transpose()?,
        port: number.map(port).transpose().map_err(|error| error.within("port"))?,
        status: u16::try_from(status).unwrap_or(302),
    })
}

fn path_edit_of(message: PathEdit) -> Result<model::PathEdit, Malformed> {
    match message.edit {
        Some(path_edit::Edit::Full(path)) => Ok(model::PathEdit::Full(path.into())),
        Some(path_edit::Edit::Prefix(path)) => Ok(model::PathEdit::Prefix(path.into())),
        None => Err(Malformed::new("path", "no kind of change that is known")),
    }
}

impl From<&model::Filters> for Filters {
    fn from(filters: &model::Filters) -> Self {
        let model::Filters { request, response, rewrite, redirect } = filters;
        let edit = |edit: &model::HeaderEdit| (!edit.is_empty()).then(|| HeaderEdit::from(edit));
        Self {
            request: edit(request),
            response: edit(response),
            rewrite: rewrite.as_ref().map(Rewrite::from),
            redirect: redirect.as_ref().map(Redirect::from),
        }
    }
}

impl From<&model::HeaderEdit> for HeaderEdit {
    fn from(edit: &model::HeaderEdit) -> Self {
        let model::HeaderEdit { remove, set, add } = edit;
        let fields = |list: &[(Arc<str>, Arc<str>)]| {
            list.iter()
                .map(|(name, value)| Field { name: name.to_string(), value: value.to_string() })
                .collect()
        };
        Self { remove: remove.iter().map(ToString::to_string).collect(), set: fields(set), add: fields(add) }
    }
}

impl From<&model::Rewrite> for Rewrite {
    fn from(rewrite: &model::Rewrite) -> Self {
        let model::Rewrite { hostname, path } = rewrite;
        Self { hostname: hostname.as_ref().map(ToString::to_string), path: path.as_ref().map(PathEdit::from) }
    }
}

impl From<&model::Redirect> for Redirect {
    fn from(redirect: &model::Redirect) -> Self {
        let model::Redirect { scheme, hostname, path, port, status } = redirect;
        Self {
            scheme: scheme.as_ref().map(ToString::to_string),
            hostname: hostname.as_ref().map(ToString::to_string),
            path: path.as_ref().map(PathEdit::from),
            port: port.map(u32::from),
            status: u32::from(*status),
        }
    }
}

impl From<&model::PathEdit> for PathEdit {
    fn from(edit: &model::PathEdit) -> Self {
        let edit = match edit {
            model::PathEdit::Full(path) => path_edit::Edit::Full(path.to_string()),
            model::PathEdit::Prefix(path) => path_edit::Edit::Prefix(path.to_string()),
        };
        Self { edit: Some(edit) }
    }
}
