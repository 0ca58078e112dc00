//! TLS with the public certificate authorities and those of a file.

use crate::provider::{ConfigFault, ProviderConfig};
use std::path::Path;
use std::sync::Arc;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};

/// What connects by TLS as `config` says.
pub fn connector(config: &ProviderConfig) -> Result<TlsConnector, ConfigFault> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    if let Some(path) = &config.ca_file {
        add(&mut roots, path).map_err(|problem| ConfigFault::CaFile {
            provider: config.name.clone(),
            path: path.clone(),
            problem,
        })?;
    }
    let mut tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|_no_version| ConfigFault::BaseUrl {
            provider: config.name.clone(),
            problem: "cannot be used: this build has no version of TLS",
        })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsConnector::from(Arc::new(tls)))
}

fn add(roots: &mut RootCertStore, path: &Path) -> Result<(), String> {
    let mut any = false;
    for certificate in
        CertificateDer::pem_file_iter(path).map_err(|fault| format!("cannot be read: {fault}"))?
    {
        let certificate = certificate.map_err(|fault| format!("is no PEM: {fault}"))?;
        roots.add(certificate).map_err(|fault| format!("has a certificate that cannot be used: {fault}"))?;
        any = true;
    }
    if any { Ok(()) } else { Err("has no certificate".into()) }
}
