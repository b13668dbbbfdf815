//! Specs of the Gateway API and Istio kinds that the mesh reads. An unknown field is an error with its path: in a
//! policy a misspelt field would otherwise widen what is allowed.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

macro_rules! strict {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Debug, Default, PartialEq, Deserialize, JsonSchema)]
            #[serde(default, deny_unknown_fields, rename_all = "camelCase")]
            #[expect(missing_docs, reason = "fields are those of the API of the same name")]
            pub struct $name { $($(#[$field_meta])* pub $field: $type,)* }
        )*
    };
}

/// A field that is known, read by nothing here, and reported when it is set.
pub type Unread = Option<serde_json::Value>;

strict! {
    /// `spec` of a GatewayClass.
    pub struct GatewayClassSpec {
        controller_name: String,
        description: Option<String>,
        parameters_ref: Unread,
    }

    /// `spec` of a Gateway.
    pub struct GatewaySpec {
        gateway_class_name: String,
        listeners: Vec<GatewayListener>,
        addresses: Unread,
        infrastructure: Option<Infrastructure>,
        allowed_listeners: Unread,
        tls: Unread,
        default_scope: Unread,
    }

    /// What is to be found on the objects that are made for a Gateway.
    pub struct Infrastructure {
        labels: BTreeMap<String, String>,
        annotations: BTreeMap<String, String>,
        parameters_ref: Unread,
    }

    /// One listener of a Gateway.
    pub struct GatewayListener {
        name: String,
        hostname: Option<String>,
        port: u16,
        protocol: String,
        tls: Unread,
        allowed_routes: Option<AllowedRoutes>,
    }

    /// Which namespaces may bind to a listener.
    pub struct AllowedRoutes {
        namespaces: Option<RouteNamespaces>,
        kinds: Vec<AllowedKind>,
    }

    /// A kind of route that may attach.
    pub struct AllowedKind {
        group: Option<String>,
        kind: String,
    }

    /// `allowedRoutes.namespaces`.
    pub struct RouteNamespaces {
        from: Option<String>,
        selector: Option<LabelSelector>,
    }

    /// A label selector with both of its forms.
    pub struct LabelSelector {
        match_labels: BTreeMap<String, String>,
        match_expressions: Vec<LabelExpression>,
    }

    /// One requirement of a label selector.
    pub struct LabelExpression {
        key: String,
        operator: String,
        values: Vec<String>,
    }

    /// `spec` of an HTTPRoute.
    pub struct HttpRouteSpec {
        parent_refs: Vec<ParentRef>,
        hostnames: Vec<String>,
        rules: Option<Vec<HttpRouteRule>>,
        use_default_gateways: Unread,
    }

    /// What a route attaches to.
    pub struct ParentRef {
        group: Option<String>,
        kind: Option<String>,
        namespace: Option<String>,
        name: String,
        section_name: Option<String>,
        port: Option<u16>,
    }

    /// One rule of an HTTPRoute.
    pub struct HttpRouteRule {
        name: Option<String>,
        matches: Vec<HttpRouteMatch>,
        filters: Vec<RouteFilter>,
        backend_refs: Vec<BackendRef>,
        timeouts: Option<RouteTimeouts>,
        retry: Unread,
        session_persistence: Unread,
    }

    /// One match of a rule.
    pub struct HttpRouteMatch {
        path: Option<HttpPathMatch>,
        headers: Vec<HttpValueMatch>,
        query_params: Vec<HttpValueMatch>,
        method: Option<String>,
    }

    /// How the path must look.
    pub struct HttpPathMatch {
        #[serde(rename = "type")]
        kind: Option<String>,
        value: Option<String>,
    }

    /// How a header or query parameter must look.
    pub struct HttpValueMatch {
        #[serde(rename = "type")]
        kind: Option<String>,
        name: String,
        value: String,
    }

    /// Where a share of the requests goes.
    pub struct BackendRef {
        group: Option<String>,
        kind: Option<String>,
        namespace: Option<String>,
        name: String,
        port: Option<u16>,
        weight: Option<i64>,
        filters: Vec<RouteFilter>,
    }

    /// What is done to a request or its response.
    pub struct RouteFilter {
        #[serde(rename = "type")]
        kind: String,
        request_header_modifier: Option<HeaderModifier>,
        response_header_modifier: Option<HeaderModifier>,
        request_redirect: Option<RequestRedirect>,
        url_rewrite: Option<UrlRewrite>,
        request_mirror: Unread,
        extension_ref: Unread,
        cors: Unread,
        external_auth: Unread,
    }

    /// `requestHeaderModifier` and `responseHeaderModifier`.
    pub struct HeaderModifier {
        set: Vec<NamedValue>,
        add: Vec<NamedValue>,
        remove: Vec<String>,
    }

    /// A header field.
    pub struct NamedValue {
        name: String,
        value: String,
    }

    /// `requestRedirect`.
    pub struct RequestRedirect {
        scheme: Option<String>,
        hostname: Option<String>,
        path: Option<PathModifier>,
        port: Option<u16>,
        status_code: Option<u16>,
    }

    /// `urlRewrite`.
    pub struct UrlRewrite {
        hostname: Option<String>,
        path: Option<PathModifier>,
    }

    /// How a path is changed.
    pub struct PathModifier {
        #[serde(rename = "type")]
        kind: String,
        replace_full_path: Option<String>,
        replace_prefix_match: Option<String>,
    }

    /// `spec` of a GRPCRoute.
    pub struct GrpcRouteSpec {
        parent_refs: Vec<ParentRef>,
        hostnames: Vec<String>,
        rules: Option<Vec<GrpcRouteRule>>,
        use_default_gateways: Unread,
    }

    /// One rule of a GRPCRoute.
    pub struct GrpcRouteRule {
        name: Option<String>,
        matches: Vec<GrpcRouteMatch>,
        filters: Vec<RouteFilter>,
        backend_refs: Vec<BackendRef>,
        session_persistence: Unread,
    }

    /// One match of a rule.
    pub struct GrpcRouteMatch {
        method: Option<GrpcMethodMatch>,
        headers: Vec<HttpValueMatch>,
    }

    /// Which service and method.
    pub struct GrpcMethodMatch {
        #[serde(rename = "type")]
        kind: Option<String>,
        service: Option<String>,
        method: Option<String>,
    }

    /// Timeouts of a rule.
    pub struct RouteTimeouts {
        request: Option<String>,
        backend_request: Option<String>,
    }

    /// `spec` of a ReferenceGrant.
    pub struct ReferenceGrantSpec {
        from: Vec<GrantFrom>,
        to: Vec<GrantTo>,
    }

    /// Who may refer.
    pub struct GrantFrom {
        group: String,
        kind: String,
        namespace: String,
    }

    /// To what.
    pub struct GrantTo {
        group: String,
        kind: String,
        name: Option<String>,
    }

    /// `spec` of an AuthorizationPolicy.
    pub struct AuthorizationPolicySpec {
        selector: Option<WorkloadSelector>,
        target_ref: Option<PolicyTarget>,
        target_refs: Vec<PolicyTarget>,
        action: Option<String>,
        provider: Unread,
        rules: Option<Vec<PolicyRule>>,
    }

    /// Istio's workload selector.
    pub struct WorkloadSelector {
        match_labels: BTreeMap<String, String>,
    }

    /// What a policy is enforced for at a waypoint.
    pub struct PolicyTarget {
        group: Option<String>,
        kind: String,
        name: String,
        namespace: Option<String>,
        section_name: Option<String>,
    }

    /// One rule of an AuthorizationPolicy.
    pub struct PolicyRule {
        from: Option<Vec<PolicyFrom>>,
        to: Option<Vec<PolicyTo>>,
        when: Option<Vec<PolicyCondition>>,
    }

    /// One entry of `from`.
    pub struct PolicyFrom {
        source: PolicySource,
    }

    /// `source`.
    pub struct PolicySource {
        principals: Vec<String>,
        not_principals: Vec<String>,
        request_principals: Vec<String>,
        not_request_principals: Vec<String>,
        namespaces: Vec<String>,
        not_namespaces: Vec<String>,
        service_accounts: Vec<String>,
        not_service_accounts: Vec<String>,
        trust_domains: Vec<String>,
        not_trust_domains: Vec<String>,
        ip_blocks: Vec<String>,
        not_ip_blocks: Vec<String>,
        remote_ip_blocks: Vec<String>,
        not_remote_ip_blocks: Vec<String>,
    }

    /// One entry of `to`.
    pub struct PolicyTo {
        operation: PolicyOperation,
    }

    /// `operation`.
    pub struct PolicyOperation {
        hosts: Vec<String>,
        not_hosts: Vec<String>,
        ports: Vec<String>,
        not_ports: Vec<String>,
        methods: Vec<String>,
        not_methods: Vec<String>,
        paths: Vec<String>,
        not_paths: Vec<String>,
    }

    /// One entry of `when`.
    pub struct PolicyCondition {
        key: String,
        values: Vec<String>,
        not_values: Vec<String>,
    }

    /// `spec` of a PeerAuthentication.
    pub struct PeerAuthenticationSpec {
        selector: Option<WorkloadSelector>,
        mtls: Option<MutualTls>,
        port_level_mtls: BTreeMap<String, MutualTls>,
    }

    /// `mtls`.
    pub struct MutualTls {
        mode: Option<String>,
    }
}

/// `status` of a Gateway, as far as it is read; other fields are another writer's business.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GatewayStatus {
    /// A Gateway without addresses is not ready.
    pub addresses: Vec<serde_json::Value>,
}
