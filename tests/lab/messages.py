"""What the CA itself says: texts of HRESULTs and disposition messages, in the CA's language, not in the web server's."""

from __future__ import annotations

from typing import Dict, Mapping, Tuple

# Facts 6: every code that it lists; English and German. 0 is success.
_TEXTS: Mapping[int, Tuple[str, str]] = {
    0: ("The operation completed successfully.", "Der Vorgang wurde erfolgreich beendet."),
    0x80004005: ("Unspecified error", "Unbekannter Fehler"),
    0x8000FFFF: ("Catastrophic failure", "Schwerwiegender Fehler"),
    0x80070005: ("Access is denied.", "Zugriff verweigert"),
    0x80070057: ("The parameter is incorrect.", "Falscher Parameter."),
    0x800706BA: ("The RPC server is unavailable.", "Der RPC-Server ist nicht verfügbar."),
    0x800706BE: ("The remote procedure call failed.", "Der Remoteprozeduraufruf ist fehlgeschlagen."),
    0x800706BF: ("The remote procedure call failed and did not execute.", "Der Remoteprozeduraufruf ist fehlgeschlagen und wurde nicht ausgeführt."),
    0x80080005: ("Server execution failed", "Starten des Servers fehlgeschlagen"),
    0x80090020: ("An internal error occurred.", "Es ist ein interner Fehler aufgetreten."),
    0x80092012: ("The revocation function was unable to check revocation for the certificate.", "Die Sperrfunktion konnte die Sperrung des Zertifikats nicht prüfen."),
    0x80092013: ("The revocation function was unable to check revocation because the revocation server was offline.", "Die Sperrfunktion konnte die Sperrung nicht prüfen, da der Sperrserver offline war."),
    0x80093005: ("An unexpected end of data was met while decoding.", "Beim Decodieren wurde ein unerwartetes Datenende gefunden."),
    0x80093102: ("ASN1 unexpected end of data.", "ASN1: Unerwartetes Datenende."),
    0x8009310B: ("ASN1 bad tag value met.", "ASN1: Ungültiger Tagwert."),
    0x80094001: ("The request subject name is invalid or too long.", "Der Antragstellername der Anforderung ist ungültig oder zu lang."),
    0x80094002: ("The request does not exist.", "Die Anforderung ist nicht vorhanden."),
    0x80094003: ("The request's current status does not allow this operation.", "Der aktuelle Status der Anforderung lässt diesen Vorgang nicht zu."),
    0x80094004: ("The requested property value is empty.", "Der angeforderte Eigenschaftswert ist leer."),
    0x80094006: ("The certification authority is being restored and can take no requests.", "Die Zertifizierungsstelle wird wiederhergestellt und nimmt keine Anforderungen an."),
    0x8009400F: ("An attempt was made to open too many sessions with the CA database.", "Es wurden zu viele Sitzungen mit der Datenbank der Zertifizierungsstelle geöffnet."),
    0x80094011: ("The permissions on this certification authority do not allow the current user to enroll for certificates.", "Die Berechtigungen dieser Zertifizierungsstelle lassen nicht zu, dass der aktuelle Benutzer Zertifikate registriert."),
    0x80094012: ("The permissions on the certificate template do not allow the current user to enroll for this type of certificate.", "Die Berechtigungen der Zertifikatvorlage lassen nicht zu, dass der aktuelle Benutzer diesen Zertifikattyp registriert."),
    0x80094014: ("The request was denied by a certificate manager or CA administrator.", "Die Anforderung wurde von einem Zertifikatverwalter oder Administrator verweigert."),
    0x80094016: ("The key or the signature of the request is too weak.", "Schlüssel oder Signatur der Anforderung sind zu schwach."),
    0x80094800: ("The requested certificate template is not supported by this CA.", "Die angeforderte Zertifikatvorlage wird von dieser Zertifizierungsstelle nicht unterstützt."),
    0x80094801: ("The request contains no certificate template information.", "Die Anforderung enthält keine Angabe zur Zertifikatvorlage."),
    0x80094802: ("The request contains conflicting template information.", "Die Anforderung enthält widersprüchliche Angaben zur Vorlage."),
    0x80094803: ("The request is missing a required Subject Alternate name extension.", "In der Anforderung fehlt die erforderliche Erweiterung für den alternativen Antragstellernamen."),
    0x80094807: ("The request template version is newer than the supported template version.", "Die Version der Vorlage ist neuer als die unterstützte."),
    0x80094809: ("The request is missing one or more required signatures.", "In der Anforderung fehlen erforderliche Signaturen."),
    0x8009480A: ("The certificate used for signing the request lacks the required application policy.", "Dem Zertifikat, mit dem die Anforderung signiert ist, fehlt die Anwendungsrichtlinie."),
    0x8009480B: ("The certificate used for signing the request lacks the required issuance policy.", "Dem Zertifikat, mit dem die Anforderung signiert ist, fehlt die Ausstellungsrichtlinie."),
    0x8009480D: ("The UPN is unavailable and can not be added to the Subject Alternate name.", "Der UPN ist nicht verfügbar und kann nicht hinzugefügt werden."),
    0x8009480E: ("The Active Directory GUID is unavailable and can not be added to the Subject Alternate name.", "Die GUID ist in Active Directory nicht verfügbar und kann nicht hinzugefügt werden."),
    0x8009480F: ("The DNS name is unavailable and can not be added to the Subject Alternate name.", "Der DNS-Name ist nicht verfügbar und kann nicht hinzugefügt werden."),
    0x80094811: ("The public key does not meet the minimum size required by the certificate template.", "Der öffentliche Schlüssel erreicht nicht die Mindestgröße der Zertifikatvorlage."),
    0x80094812: ("The email name is unavailable and can not be added to the Subject or Subject Alternate name.", "Der E-Mail-Name ist nicht verfügbar und kann nicht hinzugefügt werden."),
    0x800B0101: ("A required certificate is not within its validity period when verifying against the current system clock.", "Ein erforderliches Zertifikat befindet sich nicht im Gültigkeitszeitraum."),
    0x800B010A: ("A certificate chain could not be built to a trusted root authority.", "Zu einer vertrauenswürdigen Stammzertifizierungsstelle konnte keine Zertifikatkette aufgebaut werden."),
    0x800B0114: ("The certificate has a name that is not in the permitted list or is explicitly excluded.", "Das Zertifikat hat einen Namen, der nicht zugelassen oder ausdrücklich ausgeschlossen ist."),
}  # fmt: skip

# The commonest ones elsewhere; the rest is told in English there.
_ABROAD: Mapping[str, Mapping[int, str]] = {
    "fr": {
        0: "L'opération a réussi.",
        0x800706BA: "Le serveur RPC n'est pas disponible.",
        0x80094004: "La valeur de la propriété demandée est vide.",
        0x80094012: "Les autorisations du modèle de certificat ne permettent pas à l'utilisateur actuel de demander ce type de certificat.",
        0x80094014: "La demande a été refusée par un gestionnaire de certificats ou un administrateur.",
        0x80094800: "Le modèle de certificat demandé n'est pas pris en charge par cette autorité.",
    },
    "zh": {
        0: "操作成功完成。",
        0x800706BA: "RPC 服务器不可用。",
        0x80094004: "请求的属性值为空。",
        0x80094012: "证书模板上的权限不允许当前用户注册此类证书。",
        0x80094014: "请求被证书管理员或 CA 管理员拒绝。",
        0x80094800: "此 CA 不支持请求的证书模板。",
    },
    "ja": {
        0: "この操作を正しく終了しました。",
        0x800706BA: "RPC サーバーを利用できません。",
        0x80094004: "要求されたプロパティの値は空です。",
        0x80094012: "証明書テンプレートのアクセス許可では、現在のユーザーはこの種類の証明書を登録できません。",
        0x80094014: "要求は証明書マネージャーまたは管理者によって拒否されました。",
        0x80094800: "要求された証明書テンプレートはこの CA でサポートされていません。",
    },
    "ru": {
        0: "Операция успешно завершена.",
        0x800706BA: "Сервер RPC недоступен.",
        0x80094004: "Запрошенное значение свойства пусто.",
        0x80094012: "Разрешения шаблона не позволяют текущему пользователю получить сертификат этого типа.",
        0x80094014: "Запрос отклонён диспетчером сертификатов или администратором.",
        0x80094800: "Запрошенный шаблон сертификата не поддерживается этим центром сертификации.",
    },
    "tr": {
        0: "İşlem başarıyla tamamlandı.",
        0x800706BA: "RPC sunucusu kullanılamıyor.",
        0x80094004: "İstenen özellik değeri boş.",
        0x80094012: "Sertifika şablonundaki izinler geçerli kullanıcının bu tür bir sertifika kaydetmesine izin vermiyor.",
        0x80094014: "İstek, bir sertifika yöneticisi tarafından reddedildi.",
        0x80094800: "İstenen sertifika şablonu bu CA tarafından desteklenmiyor.",
    },
    "ar": {
        0: "تمت العملية بنجاح.",
        0x800706BA: "خادم RPC غير متوفر.",
        0x80094004: "قيمة الخاصية المطلوبة فارغة.",
        0x80094012: "لا تسمح أذونات قالب الشهادة للمستخدم الحالي بتسجيل هذا النوع من الشهادات.",
        0x80094014: "تم رفض الطلب من قبل مدير الشهادات أو المسؤول.",
        0x80094800: "قالب الشهادة المطلوب غير معتمد من المرجع المصدق هذا.",
    },
    "es": {
        0: "La operación se completó correctamente.",
        0x800706BA: "El servidor RPC no está disponible.",
        0x80094004: "El valor de la propiedad solicitada está vacío.",
        0x80094012: "Los permisos de la plantilla no permiten al usuario actual inscribirse para este tipo de certificado.",
        0x80094014: "Un administrador de certificados denegó la solicitud.",
        0x80094800: "Esta entidad de certificación no admite la plantilla de certificado solicitada.",
    },
}  # fmt: skip

# Facts 2.1 has the English ones (MS-CSRA 3.1.4.1.4).
_DISPOSITIONS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "policy": "Denied by Policy Module", "parsing": "Error Parsing Request", "taken": "Taken Under Submission",
        "constructing": "Error Constructing or Publishing Certificate", "manager": "Denied by {account}", "issued": "Issued",
        "revoked": "Revoked by {account}", "unknown": "The request was denied.",
    },
    "de": {
        "policy": "Vom Richtlinienmodul verweigert", "parsing": "Fehler beim Auswerten der Anforderung", "taken": "Zur Bearbeitung angenommen",
        "constructing": "Fehler beim Erstellen oder Veröffentlichen des Zertifikats", "manager": "Verweigert von {account}",
        "issued": "Ausgestellt", "revoked": "Gesperrt von {account}", "unknown": "Die Anforderung wurde verweigert.",
    },
    "fr": {
        "policy": "Refusé par le module de stratégie", "parsing": "Erreur lors de l'analyse de la demande", "taken": "Prise en compte de la soumission",
        "constructing": "Erreur lors de la construction ou de la publication du certificat", "manager": "Refusée par {account}",
        "issued": "Émis", "revoked": "Révoqué par {account}", "unknown": "La demande a été refusée.",
    },
    "zh": {
        "policy": "被策略模块拒绝", "parsing": "分析请求时出错", "taken": "已被提交", "constructing": "构造或发布证书时出错",
        "manager": "被 {account} 拒绝", "issued": "已颁发", "revoked": "被 {account} 吊销", "unknown": "请求被拒绝。",
    },
    "ja": {
        "policy": "ポリシー モジュールによって拒否されました", "parsing": "要求の解析エラー", "taken": "提出を受け付けました",
        "constructing": "証明書の作成または発行のエラー", "manager": "{account} によって拒否されました", "issued": "発行済み",
        "revoked": "{account} によって失効されました", "unknown": "要求は拒否されました。",
    },
    "ru": {
        "policy": "Отклонено модулем политики", "parsing": "Ошибка разбора запроса", "taken": "Принято к рассмотрению",
        "constructing": "Ошибка создания или публикации сертификата", "manager": "Отклонено пользователем {account}", "issued": "Выдан",
        "revoked": "Отозвано пользователем {account}", "unknown": "Запрос отклонён.",
    },
    "tr": {
        "policy": "İlke modülü tarafından reddedildi", "parsing": "İstek çözümlenirken hata oluştu", "taken": "Gönderim alındı",
        "constructing": "Sertifika oluşturulurken veya yayımlanırken hata oluştu", "manager": "{account} tarafından reddedildi",
        "issued": "Verildi", "revoked": "{account} tarafından iptal edildi", "unknown": "İstek reddedildi.",
    },
    "ar": {
        "policy": "تم الرفض من قبل وحدة النهج", "parsing": "خطأ أثناء تحليل الطلب", "taken": "تم استلام الطلب",
        "constructing": "خطأ أثناء إنشاء الشهادة أو نشرها", "manager": "تم الرفض من قبل {account}", "issued": "تم الإصدار",
        "revoked": "تم الإبطال من قبل {account}", "unknown": "تم رفض الطلب.",
    },
    "es": {
        "policy": "Denegado por el módulo de directivas", "parsing": "Error al analizar la solicitud", "taken": "Recibido para su revisión",
        "constructing": "Error al construir o publicar el certificado", "manager": "Denegado por {account}", "issued": "Emitido",
        "revoked": "Revocado por {account}", "unknown": "Se denegó la solicitud.",
    },
}  # fmt: skip


def known() -> Dict[int, str]:
    """Return the English text of every HRESULT that has one."""
    return {code: texts[0] for code, texts in _TEXTS.items()}


def text(hresult: int, language: str = "en") -> str:
    """Return an HRESULT's text, English where the language has none, "" where nobody has."""
    english, german = _TEXTS.get(hresult, ("", ""))
    return german if language == "de" else _ABROAD.get(language, {}).get(hresult, english)


def words(kind: str, language: str, account: str = "") -> str:
    """Return a disposition message's fixed words: policy, manager, parsing, constructing, taken, issued, revoked or unknown."""
    return _DISPOSITIONS[language][kind].format(account=account)


def code(hresult: int) -> str:
    """Return an HRESULT as messages hold it: eight digits, lower case."""
    return f"0x{hresult:08x}"


def coded(hresult: int) -> str:
    """Return an HRESULT as pages show it: with the Win32 number where it is one, else with the signed decimal (facts 2.2, 2.3)."""
    if not hresult or hresult >> 16 == 0x8007:
        return f"0x{hresult:x} (WIN32: {hresult & 0xFFFF})"
    return f"{code(hresult)} ({hresult - (1 << 32) if hresult >> 31 else hresult})"
